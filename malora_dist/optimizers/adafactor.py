"""Adafactor of transformers with a given learning rate: of the second moment it keeps means of rows and columns.

A stack of matrices, as factors of experts are, has means for each matrix. Every update is limited by the root mean
square of the whole tensor's.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from malora_dist.optimizers.spec import FP32, OptimizerSpec, Shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def build(
    groups: list[dict[str, Any]], *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> "Optimizer":
    """Make transformers' Adafactor as its Trainer does for `optim="adafactor"`. `betas` and `eps` are not used."""
    from transformers.optimization import Adafactor

    optimizer: Optimizer = Adafactor(
        groups, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False
    )
    return optimizer


class Factored:
    """Means of squared gradients over the last and over the next to last dimension; vectors keep them whole."""

    elementwise: ClassVar[bool] = False

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) < 2:
            return {"exp_avg_sq": shape}
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}

    def read(self, state: Mapping[str, Any], start: int, stop: int) -> "dict[str, Tensor]":
        return {name: state[name] for name in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col") if name in state}

    def write(self, optimizer: Any, tensor: "Tensor", step: int, values: "dict[str, Tensor]") -> None:
        # RMS, the size of the weights, is computed anew in each step.
        optimizer.state[tensor] = {"step": step, "RMS": 0} | values

    def num_bytes(self, shape: Shape) -> int:
        return FP32 * sum(math.prod(each) for each in self.shapes(shape).values())


ADAFACTOR = OptimizerSpec(
    name="adafactor",
    kind="adafactor",
    label="Adafactor",
    state_label="Adafactor's row and column means",
    description="row and column means in the place of moments, at ZeRO-0 and ep_size 1",
    build=build,
    layout=Factored(),
    group_keys=("lr", "eps", "clip_threshold", "decay_rate", "weight_decay"),
    zero_stages=(0,),
    expert_slices=False,
    rule="it needs whole tensors, for means of their rows and columns and for the size of an update",
    inapplicable=("adam_beta1", "adam_beta2", "adam_epsilon"),
)
