"""Norms and cosines of the experts of a layer, from small products of their factors."""

from collections.abc import Mapping

import torch
from torch import Tensor


def expert_gram(factors: Mapping[str, Tensor]) -> Tensor:
    """Compute <B_t A_t, B_u A_u>, (E, E) fp64, of factors B (E, O, R) and A (E, R, I), or shared_A and P.

    <B_t A_t, B_u A_u> = sum of (B_t' B_u) * (A_t A_u'): no (O, I) matrix is formed.
    """
    B_EOR = factors["B"].double()
    E, O, R = B_EOR.shape  # noqa: E741
    if "A" in factors:
        A_ERI = factors["A"].double()
    else:
        shared_DI = factors["shared_A"].double()
        A_ERI = factors["P"].double() @ shared_DI if "P" in factors else shared_DI.expand(E, *shared_DI.shape)
    B_ON = B_EOR.permute(1, 0, 2).reshape(O, E * R)
    A_NI = A_ERI.reshape(E * R, -1)
    return ((B_ON.T @ B_ON) * (A_NI @ A_NI.T)).view(E, R, E, R).sum(dim=(1, 3))


def norms_and_cosines(gram_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Return Frobenius norms (E,) and cosines (E, E) of the experts; the cosine with an expert of norm 0 is 0."""
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt()
    product_EE = norm_E[:, None] * norm_E
    return norm_E, torch.where(product_EE > 0, gram_EE / product_EE.clamp(min=torch.finfo(product_EE.dtype).tiny), 0.0)
