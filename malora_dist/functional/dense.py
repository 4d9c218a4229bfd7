"""The sum over experts as two products over all of them, masked by the gates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_experts(
    base_TO: Tensor | None,
    h_TD: Tensor,
    core_ERD: Tensor | None,
    B_EOR: Tensor,
    gates_TE: Tensor | None,
    scaling: float,
) -> Tensor:
    """(T, O): base + s * sum_e g_e B_e C_e h, added to `base_TO` in place if there is one.

    No sort, static shapes, no host synchronisation. `gates_TE` is 0 where an expert was not chosen; without it all
    weigh 1. Without a core, h (T, E*R) holds every expert's own C_e h already, or h (T, R) is the same for all.
    """
    result: Tensor = _DenseExperts.apply(base_TO, h_TD, core_ERD, B_EOR, gates_TE, scaling)
    return result


class _DenseExperts(torch.autograd.Function):
    """Keeps h, z = C h (T, E*R) and the gates. Weights are read again in backward, when ZeRO-3 has gathered them."""

    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor | None,
        h_TD: Tensor,
        core_ERD: Tensor | None,
        B_EOR: Tensor,
        gates_TE: Tensor | None,
        scaling: float,
    ) -> Tensor:
        E, _, R = B_EOR.shape
        ctx.scaling, ctx.repeated = scaling, core_ERD is None and h_TD.shape[1] != E * R
        z_TN = h_TD.repeat(1, E) if ctx.repeated else h_TD
        if core_ERD is not None:
            z_TN = F.linear(h_TD, core_ERD.flatten(0, 1).to(h_TD.dtype))
        ctx.save_for_backward(h_TD if core_ERD is not None or ctx.repeated else None, z_TN, core_ERD, B_EOR, gates_TE)
        weighted_TN = z_TN * _weights(gates_TE, R, scaling, z_TN.dtype)
        B_NO = _rows(B_EOR, z_TN.dtype)
        if base_TO is None:
            return weighted_TN @ B_NO
        ctx.mark_dirty(base_TO)
        base_TO.addmm_(weighted_TN, B_NO)
        return base_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, z_TN, core_ERD, B_EOR, gates_TE = ctx.saved_tensors
        (grad_TO,) = grads
        need_base, need_h, need_core, need_B, need_gates, _ = ctx.needs_input_grad
        (E, O, R), dtype = B_EOR.shape, z_TN.dtype  # noqa: E741
        weights = _weights(gates_TE, R, ctx.scaling, dtype)
        grad_z_TN = grad_TO @ _rows(B_EOR, dtype).T
        grad_h = grad_core = grad_B = grad_gates = None
        if need_B:
            grad_B_NO = (z_TN * weights).T @ grad_TO
            grad_B = grad_B_NO.view(E, R, O).transpose(1, 2).contiguous().to(B_EOR.dtype)
        if need_gates:
            # In the dtype of the gates, since the softmax behind them subtracts.
            products_TN = grad_z_TN * z_TN.to(gates_TE.dtype)
            grad_gates = products_TN.view(-1, E, R).sum(dim=2).mul_(ctx.scaling)
        grad_z_TN.mul_(weights)
        if need_core:
            grad_core = (grad_z_TN.T @ h_TD).view_as(core_ERD).to(core_ERD.dtype)
        if need_h:
            grad_h = grad_z_TN
            if core_ERD is not None:
                grad_h = grad_z_TN @ core_ERD.flatten(0, 1).to(dtype)
            elif ctx.repeated:
                grad_h = grad_z_TN.view(-1, E, R).sum(dim=1)
        return grad_TO if need_base else None, grad_h, grad_core, grad_B, grad_gates, None


def _rows(B_EOR: Tensor, dtype: torch.dtype) -> Tensor:
    """(E*R, O), as the product with z wants it."""
    return B_EOR.to(dtype).transpose(1, 2).reshape(-1, B_EOR.shape[1])


def _weights(gates_TE: Tensor | None, R: int, scaling: float, dtype: torch.dtype) -> Tensor | float:
    """s * g, (T, E*R): once for each of an expert's ranks. A number where there are no gates."""
    if gates_TE is None:
        return scaling
    return (gates_TE * scaling).to(dtype).repeat_interleave(R, dim=1, output_size=gates_TE.shape[1] * R)
