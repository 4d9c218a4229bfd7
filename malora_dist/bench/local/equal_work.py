"""Everyone must do the same: start from the base's output, on the same tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor

# bitsandbytes rounds a dequantised weight as our layer does, but may multiply in another order.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check_outputs(outputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise RuntimeError if a first output is not the first subject's, relative to its largest number.

    Adapters start at zero, so a baseline that differs computes something else.
    """
    first, expected = next(iter(outputs.items()))
    scale = expected.abs().max()
    for name, output in outputs.items():
        same_shape = output.shape == expected.shape
        difference = float((output - expected).abs().max() / scale) if same_shape else float("inf")
        if not difference <= TOLERANCE[dtype]:
            raise RuntimeError(f"{name} does other work than {first}: its first output differs by {difference:.1e}")


def check_losses(losses: Mapping[str, float], dtype: torch.dtype) -> None:
    """Raise RuntimeError if a first loss is not the first subject's."""
    first, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        if not abs(loss - expected) <= TOLERANCE[dtype] * abs(expected):
            raise RuntimeError(f"{name} does other work than {first}: its first loss is {loss}, not {expected}")
