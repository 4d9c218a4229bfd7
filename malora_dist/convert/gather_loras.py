"""N LoRAs of one linear as the experts of one mixture: the arithmetic, in fp64 and without any (O, I) matrix.

LoRA i adds B_i A_i, its scaling folded into B_i. With B_i = Q_i R_i (thin QR) the shared subspace is that of the top
D right singular vectors V (D, I) of the stacked R_i A_i: the best for the sum of squares of all B_i A_i. Then
S_A = beta V and P_i = A_i V' / beta, and B_i is kept. Exact once D is at least the sum of the ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.ops.init import kaiming_uniform

Pair = tuple[Tensor, Tensor]  # B (O, R) with its scaling in it, A (R, I)


def resized(pair: Pair, r: int) -> Pair:
    """Return the pair with rank r: the nearest product where the rank shrinks, padded with zeros where it grows."""
    B_OR, A_RI = pair
    rank = len(A_RI)
    if rank > r:
        Q_left, R_left = torch.linalg.qr(B_OR)
        Q_right, R_right = torch.linalg.qr(A_RI.T)
        U, sigma, Vh = torch.linalg.svd(R_left @ R_right.T)
        root = sigma[:r].sqrt()
        return Q_left @ (U[:, :r] * root), (root[:, None] * Vh[:r]) @ Q_right.T
    return F.pad(B_OR, (0, r - rank)), F.pad(A_RI, (0, 0, 0, r - rank))


def shared_subspace(pairs: Sequence[Pair], d: int, beta: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return S_A (D, I) and P (E, R, D) for pairs of equal rank. Directions that no pair needs are drawn at random."""
    stacked_NI = torch.cat([torch.linalg.qr(B_OR).R @ A_RI for B_OR, A_RI in pairs])
    # The right singular vectors of M are those of the small R' in M' = Q R, taken back through Q.
    Q_IN, R_NN = torch.linalg.qr(stacked_NI.T)
    V_DI = (torch.linalg.svd(R_NN.T).Vh @ Q_IN.T)[:d]
    if len(V_DI) < d:
        more_DI = torch.randn(d - len(V_DI), V_DI.shape[1], generator=generator, dtype=V_DI.dtype)
        # Twice, so that it is orthogonal to V to rounding.
        for _ in range(2):
            more_DI = torch.linalg.qr((more_DI - more_DI @ V_DI.T @ V_DI).T).Q.T
        V_DI = torch.cat([V_DI, more_DI])
    return beta * V_DI, torch.stack([A_RI @ V_DI.T / beta for _, A_RI in pairs])


def fill_new_ranks(down_ERD: Tensor, ranks: Sequence[int], beta: float, generator: torch.Generator) -> None:
    """Draw, in place, the rows of P or A of the ranks that an expert did not have, as at the start of a training.

    Their columns of B are 0, so they add nothing yet; if the rows were 0 too, neither would ever get a gradient.
    """
    for core_RD, rank in zip(down_ERD, ranks, strict=True):
        new_RD = core_RD[rank:]
        new_RD.copy_(kaiming_uniform(tuple(new_RD.shape), fan_in=core_RD.shape[1], generator=generator) / beta)


def squared_error(old: Pair, new: Pair) -> tuple[float, float]:
    """Compute |B A - B' A'|^2 and |B A|^2, Frobenius, through the QR of [B B'] and a few rows of I numbers."""
    Q = torch.linalg.qr(torch.cat([old[0], new[0]], dim=1)).Q
    before, after = (Q.T @ old[0]) @ old[1], (Q.T @ new[0]) @ new[1]
    return float((before - after).square().sum()), float(before.square().sum())
