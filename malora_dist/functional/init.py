"""Initial values of the adapter factors (MALoRA section 3.2, eqs. 8-10)."""

import math

import torch
from torch import Tensor


def kaiming_uniform(shape: tuple[int, ...], *, fan_in: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw uniformly on +-1/sqrt(fan_in): Kaiming-uniform with a = sqrt(5), LoRA's own. Variance 1/(3 fan_in).

    On the CPU under every default device, so that the same generator gives the same bits for every device.
    """
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def shared_subspace_init(K_EDI: Tensor, r: int, beta: float) -> tuple[Tensor, Tensor]:
    """S_A (D, I) and P (E, R, D) from one Kaiming-uniform matrix K_t per expert.

    Eq. 8: K_t = U_t S_t V_t. Eq. 9: P_t = (U_t S_t)[:r] / beta. Eq. 10: S_A = beta V_0, the first expert's right
    singular vectors, the common basis. So P_0 S_A = K_0[:r], and every P_t S_A has the variance of K_t for any beta.
    """
    U_EDD, S_ED, V_EDI = torch.linalg.svd(K_EDI, full_matrices=False)
    P_ERD = (U_EDD * S_ED[:, None, :])[:, :r] / beta
    return beta * V_EDI[0], P_ERD
