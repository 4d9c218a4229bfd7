"""Initial values of the adapter factors (MALoRA section 3.2, eqs. 8-10), on the CPU: the same bits for every device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def kaiming_uniform(shape: tuple[int, ...], *, fan_in: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw uniformly on +-1/sqrt(fan_in): Kaiming-uniform with a = sqrt(5), LoRA's own. Variance 1/(3 fan_in).

    fp32 on the CPU, under every default device and default dtype.
    """
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def shared_subspace_init(K_EDI: Tensor, r: int, beta: float) -> tuple[Tensor, Tensor]:
    """Compute S_A (D, I) and P (E, R, D) from one Kaiming-uniform matrix K_t per expert.

    Eq. 8: K_t = U_t S_t V_t. Eq. 9: P_t = (U_t S_t)[:r] / beta. Eq. 10: S_A = beta V_0, the first expert's right
    singular vectors, the common basis. So P_0 S_A = K_0[:r], and every P_t S_A has the variance of K_t for any beta.

    K_t K_t^T = U_t S_t^2 U_t^T is D x D, and V_0 = S_0^-1 U_0^T K_0: no other expert's V_t is computed. In fp64, where
    the squares of singular values lose nothing that fp32 could hold. Singular values descend; the largest number of
    each column of U_t is positive, so that no library and no CPU chooses the signs.
    """
    assert K_EDI.shape[1] <= K_EDI.shape[2], "no more than I rows can be orthogonal"
    K = K_EDI.double()
    with _one_thread():
        squares_ED, U_EDD = (part.flip(-1) for part in torch.linalg.eigh(K @ K.mT))
        S_ED = squares_ED.clamp(min=torch.finfo(K.dtype).tiny).sqrt()
        U_EDD = U_EDD * U_EDD.gather(1, U_EDD.abs().argmax(dim=1, keepdim=True)).sign()
        V_DI = (U_EDD[0] / S_ED[0]).mT @ K[0]
    P_ERD = (U_EDD * S_ED[:, None, :])[:, :r] / beta
    return (beta * V_DI).to(K_EDI.dtype), P_ERD.to(K_EDI.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: how BLAS adds up depends on their number, and processes may have different ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
