"""The sum over experts as two products over all of them, masked by the gates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora_dist.ops.gating import gate_ranks, gate_ranks_backward_
from malora_dist.ops.products import WeightCopies, expert_rows, scaled_product


def dense_experts(
    base_TO: Tensor | None,
    h_TD: Tensor,
    down_ERD: Tensor | None,
    B_EOR: Tensor,
    gates_TE: Tensor | None,
    scaling: float,
    copies: WeightCopies | None = None,
) -> Tensor:
    """Compute base + s * sum_e g_e B_e C_e h, (T, O), by products over all experts.

    No sort, static shapes, no host synchronisation.

    Args:
        base_TO: what the sum is added to, in place; None: nothing.
        h_TD: (T, D). Without `down_ERD`, (T, E*R) that holds every expert's own C_e h, or (T, R), the same for all.
        down_ERD: C, the experts' P or A.
        B_EOR: the experts' up-projections.
        gates_TE: 0 where an expert was not chosen; None: all weigh 1.
        scaling: s.
        copies: where copies of weights in the dtype of h are kept.
    """
    result: Tensor = _DenseExperts.apply(base_TO, h_TD, down_ERD, B_EOR, gates_TE, scaling, copies)
    return result


class _DenseExperts(torch.autograd.Function):
    """Keeps h, z = C h (T, E*R) and the gates. Weights are read again in backward, when ZeRO-3 has gathered them."""

    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor | None,
        h_TD: Tensor,
        down_ERD: Tensor | None,
        B_EOR: Tensor,
        gates_TE: Tensor | None,
        scaling: float,
        copies: WeightCopies | None,
    ) -> Tensor:
        E, _, R = B_EOR.shape
        ctx.scaling, ctx.copies, ctx.repeated = scaling, copies, down_ERD is None and h_TD.shape[1] != E * R
        z_TN = h_TD.repeat(1, E) if ctx.repeated else h_TD
        if down_ERD is not None:
            z_TN = F.linear(h_TD, expert_rows(down_ERD, h_TD.dtype, copies, "down"))
        ctx.save_for_backward(h_TD if down_ERD is not None or ctx.repeated else None, z_TN, down_ERD, B_EOR, gates_TE)
        B_NO = expert_rows(B_EOR, z_TN.dtype, copies, "B", transpose=True)
        gated_TN, alpha = (z_TN, scaling) if gates_TE is None else (gate_ranks(z_TN, gates_TE, scaling), 1.0)
        if base_TO is None:
            return scaled_product(gated_TN, B_NO, alpha)
        ctx.mark_dirty(base_TO)
        base_TO.addmm_(gated_TN, B_NO, alpha=alpha)
        return base_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, z_TN, down_ERD, B_EOR, gates_TE = ctx.saved_tensors
        (grad_TO,) = grads
        need_base, need_h, need_down, need_B, *_ = ctx.needs_input_grad
        (E, O, R), dtype = B_EOR.shape, z_TN.dtype  # noqa: E741
        B_NO = expert_rows(B_EOR, dtype, ctx.copies, "B", transpose=True)
        grad_h = grad_down = grad_B = grad_gates = None
        if gates_TE is None:
            gated_TN, alpha = z_TN, ctx.scaling
            grad_z_TN = scaled_product(grad_TO, B_NO.T, alpha)
        else:
            grad_z_TN, alpha = grad_TO @ B_NO.T, 1.0
            gated_TN, grad_gates = gate_ranks_backward_(grad_z_TN, z_TN, gates_TE, ctx.scaling)
        if need_B:
            grad_B_ERO = scaled_product(gated_TN.T, grad_TO, alpha).view(E, R, O)
            grad_B = torch.empty_like(B_EOR).copy_(grad_B_ERO.transpose(1, 2))
        if need_down:
            grad_down = (grad_z_TN.T @ h_TD).view_as(down_ERD).to(down_ERD.dtype)
        if need_h:
            grad_h = grad_z_TN
            if down_ERD is not None:
                grad_h = grad_z_TN @ expert_rows(down_ERD, dtype, ctx.copies, "down")
            elif ctx.repeated:
                grad_h = grad_z_TN.view(-1, E, R).sum(dim=1)
        return grad_TO if need_base else None, grad_h, grad_down, grad_B, grad_gates, None, None
