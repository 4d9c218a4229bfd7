"""Products with weights: their scale, and copies of weights in the dtype and layout that products read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def scaled_product(left_MK: Tensor, right_KN: Tensor, alpha: float) -> Tensor:
    """Compute alpha * left @ right, (M, N), rounded once."""
    if alpha == 1:
        return left_MK @ right_KN
    # With beta = 0 nothing of the first argument is read.
    return torch.addmm(left_MK.new_empty(1), left_MK, right_KN, beta=0, alpha=alpha)


class WeightCopies:
    """What the products of one module read in place of its weights, kept from the first use on."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """Return the copy of this name and dtype; `make` is called the first time."""
        key = name, dtype
        if key not in self.tensors:
            self.tensors[key] = make()
        return self.tensors[key]


@contextmanager
def kept_weight_copies(model: nn.Module) -> Iterator[None]:
    """Let every module with an attribute `weight_copies` keep its copies until the end of the block.

    Nothing may change the weights inside: neither versions nor addresses of parameters tell, since ZeRO writes to
    other memory and gathers anew. Outside such a block every product makes its own copy.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "weight_copies")]
    for module in modules:
        module.weight_copies = WeightCopies()
    try:
        yield
    finally:
        for module in modules:
            module.weight_copies = None


def expert_rows(
    weight_EFD: Tensor, dtype: torch.dtype, copies: WeightCopies | None, name: str, *, transpose: bool = False
) -> Tensor:
    """Return experts' stacked weights (E, R, W) as rows (E*R, W) in `dtype`; `transpose` those of (E, W, R).

    A copy is kept where the dtype differs from the weight's.
    """

    def make() -> Tensor:
        rows = weight_EFD.transpose(1, 2) if transpose else weight_EFD
        # One pass that transposes and rounds.
        made = rows if rows.dtype == dtype else torch.empty(rows.shape, dtype=dtype, device=rows.device).copy_(rows)
        return made.reshape(-1, rows.shape[2])

    return make() if copies is None or weight_EFD.dtype == dtype else copies.get(name, dtype, make)
