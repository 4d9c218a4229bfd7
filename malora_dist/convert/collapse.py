"""A routed layer as one static LoRA: delta = s * L S with one (O, D) matrix L in place of sum_t g_t(x) B_t P_t.

    mean     L = sum_t E[g_t] B_t P_t, exact where gates do not depend on the token
    lstsq    L = sum_t B_t P_t C_t C^-1 with C = E[h h'], C_t = E[g_t h h'], h = S x: of all L the one with the least
             mean square of  sum_t g_t B_t P_t h - L h  over the calibration tokens

The inverse is damped towards `mean`: C + ridge * trace(C) / D * I, and C_t - E[g_t] C in the place of C_t. So constant
gates give `mean` exactly, and the error on the calibration tokens is never above that of `mean`.
"""

import torch
from torch import Tensor

from malora_dist.convert.calibration import LayerStatistics
from malora_dist.convert.subspace import Subspace

RIDGE = 1e-6


def static_up(space: Subspace, statistics: LayerStatistics, fit: str, ridge: float = RIDGE) -> Tensor:
    """Return L (O, D), fp64. `fit` is mean or lstsq; lstsq needs statistics with moments."""
    gates_E = statistics.mean_gates_E
    L_OD: Tensor = torch.einsum("e,eor,erd->od", gates_E, space.B_EOR, space.P_ERD)
    if fit == "mean":
        return L_OD
    assert fit == "lstsq" and statistics.moment_DD is not None and statistics.gated_EDD is not None
    C_DD, C_EDD = statistics.moment_DD / statistics.tokens, statistics.gated_EDD / statistics.tokens
    damping = ridge * C_DD.trace() / len(C_DD)
    if damping == 0:
        return L_OD
    excess_EDD = C_EDD - gates_E[:, None, None] * C_DD
    excess_OD = torch.einsum("eor,erc,ecd->od", space.B_EOR, space.P_ERD, excess_EDD)
    damped = C_DD + damping * torch.eye(len(C_DD), dtype=C_DD.dtype)
    correction_OD: Tensor = torch.linalg.solve(damped, excess_OD, left=False)
    return L_OD + correction_OD


def truncated(L_OD: Tensor, S_DI: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the nearest product of rank R to L S, as (O, R) and (R, I), and the part of its norm that is lost, 0 to 1.

    It is computed by the SVD of the (D, D) core between two QR decompositions; no (O, I) matrix is formed.
    """
    Q_left, R_left = torch.linalg.qr(L_OD)
    Q_right, R_right = torch.linalg.qr(S_DI.T)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.T)
    root = sigma[:rank].sqrt()
    lost = (sigma[rank:].norm() / sigma.norm()).item() if sigma.norm() > 0 else 0.0
    return Q_left @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ Q_right.T, lost
