"""A product times a number, in one operation."""

import torch
from torch import Tensor


def scaled_product(left_MK: Tensor, right_KN: Tensor, alpha: float) -> Tensor:
    """Compute alpha * left @ right, (M, N), rounded once."""
    if alpha == 1:
        return left_MK @ right_KN
    # With beta = 0 nothing of the first argument is read.
    return torch.addmm(left_MK.new_empty(1), left_MK, right_KN, beta=0, alpha=alpha)
