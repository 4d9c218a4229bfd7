"""The sum over experts, multiplying only the rows that chose each: sorted by expert, one product per expert."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora_dist.ops.grouped_triton import grouped_backward, grouped_forward
from malora_dist.ops.products import WeightCopies, expert_rows
from malora_dist.ops.routing import Routing


def grouped_experts(
    base_TO: Tensor | None,
    h_TD: Tensor,
    down_ERD: Tensor | None,
    B_EOR: Tensor,
    routing: Routing,
    scaling: float,
    copies: WeightCopies | None = None,
    *,
    triton: bool = False,
) -> Tensor:
    """Compute base + s * sum_k g_k B_{e_k} C_{e_k} h, (T, O), by products over the rows that chose each expert.

    Every expert takes part in the products, with no row if need be, so that each rank's backward touches every
    parameter. Rows are unpermuted and summed over K in order: deterministic, unlike index_add on CUDA. The host waits
    for the experts' counts.

    Args:
        base_TO: what the sum is added to, in place; None: nothing.
        h_TD: what the experts read; without `down_ERD` of their rank, (T, R).
        down_ERD: C, the experts' P or A.
        B_EOR: the experts' up-projections.
        routing: chosen experts and gates.
        scaling: s.
        copies: where copies of weights in the dtype of h are kept.
        triton: compute by the kernels of `grouped_triton`, for which the host does not wait.
    """
    arguments = (base_TO, h_TD, down_ERD, B_EOR, routing.gates_TK, routing.expert_ids_TK, scaling)
    # The kernels round weights tile by tile.
    result: Tensor = _TritonExperts.apply(*arguments) if triton else _GroupedExperts.apply(*arguments, copies)
    return result


class _Permutation(NamedTuple):
    """Slots (token, k) sorted by expert: the token of each sorted slot, its place before sorting, rows per expert."""

    token_N: Tensor
    slot_N: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, expert_ids_TK: Tensor, num_experts: int) -> "_Permutation":
        """Sort the slots by expert. The host waits for the sizes."""
        slots = expert_ids_TK.reshape(-1)
        slot_N = slots.argsort(stable=True)
        sizes = torch.bincount(slots, minlength=num_experts).tolist()
        return cls(slot_N // expert_ids_TK.shape[1], slot_N, sizes)


class _GroupedExperts(torch.autograd.Function):
    """Keeps h, the gates, the order and the sorted z = C h (T*K, R). Weights are read again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor | None,
        h_TD: Tensor,
        down_ERD: Tensor | None,
        B_EOR: Tensor,
        gates_TK: Tensor,
        expert_ids_TK: Tensor,
        scaling: float,
        copies: WeightCopies | None,
    ) -> Tensor:
        order = _Permutation.of(expert_ids_TK, len(B_EOR))
        rows_ND = h_TD[order.token_N]
        down, B_ERO = _expert_weights(down_ERD, B_EOR, h_TD.dtype, copies)
        z_NR = rows_ND if down is None else _products(rows_ND, down.transpose(1, 2), order.sizes)
        ctx.save_for_backward(h_TD, down_ERD, B_EOR, gates_TK, z_NR, order.token_N, order.slot_N)
        ctx.sizes, ctx.scaling, ctx.copies = order.sizes, scaling, copies
        gates_N1 = gates_TK.reshape(-1)[order.slot_N, None].to(h_TD.dtype)
        delta_TO = _unpermute(_products(z_NR * gates_N1, B_ERO, order.sizes), order.slot_N, gates_TK.shape)
        if base_TO is None:
            return delta_TO.mul_(scaling)
        ctx.mark_dirty(base_TO)
        base_TO.add_(delta_TO, alpha=scaling)
        return base_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, down_ERD, B_EOR, gates_TK, z_NR, token_N, slot_N = ctx.saved_tensors
        need_base, need_h, need_down, need_B, need_gates, *_ = ctx.needs_input_grad
        gates_N1 = gates_TK.reshape(-1)[slot_N, None].to(z_NR.dtype)
        grad_NO = grads[0][token_N].mul_(ctx.scaling)
        down, B_ERO = _expert_weights(down_ERD, B_EOR, z_NR.dtype, ctx.copies)
        grad_zg_NR = _products(grad_NO, B_ERO.transpose(1, 2), ctx.sizes)
        grad_z_NR = grad_zg_NR * gates_N1
        grad_B = _outer(grad_NO, z_NR * gates_N1, B_EOR, ctx.sizes) if need_B else None
        grad_down = _outer(grad_z_NR, h_TD[token_N], down_ERD, ctx.sizes) if need_down else None
        grad_h = grad_gates = None
        if need_gates:
            sums_N = (grad_zg_NR * z_NR).sum(dim=1, dtype=gates_TK.dtype)
            grad_gates = torch.empty_like(sums_N).scatter_(0, slot_N, sums_N).view_as(gates_TK)
        if need_h:
            rows_ND = grad_z_NR if down is None else _products(grad_z_NR, down, ctx.sizes)
            grad_h = _unpermute(rows_ND, slot_N, gates_TK.shape)
        return grads[0] if need_base else None, grad_h, grad_down, grad_B, grad_gates, None, None, None


class _TritonExperts(torch.autograd.Function):
    """Keeps h, the gates and z = C h (T, K, R)."""

    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor | None,
        h_TD: Tensor,
        down_ERD: Tensor | None,
        B_EOR: Tensor,
        gates_TK: Tensor,
        expert_ids_TK: Tensor,
        scaling: float,
    ) -> Tensor:
        if base_TO is None:
            y_TO = h_TD.new_zeros(len(h_TD), B_EOR.shape[1])
        else:
            ctx.mark_dirty(base_TO)
            y_TO = base_TO
        z_TKR = grouped_forward(y_TO, h_TD, down_ERD, B_EOR, gates_TK, expert_ids_TK, scaling)
        ctx.save_for_backward(h_TD, down_ERD, B_EOR, gates_TK, expert_ids_TK, z_TKR)
        ctx.scaling = scaling
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, down_ERD, B_EOR, gates_TK, expert_ids_TK, z_TKR = ctx.saved_tensors
        gradients = grouped_backward(grads[0], h_TD, down_ERD, B_EOR, gates_TK, expert_ids_TK, z_TKR, ctx.scaling)
        return grads[0] if ctx.needs_input_grad[0] else None, *gradients, None, None


def _expert_weights(
    down_ERD: Tensor | None, B_EOR: Tensor, dtype: torch.dtype, copies: WeightCopies | None
) -> tuple[Tensor | None, Tensor]:
    """Return C (E, R, D) if there is one, and B (E, R, O), in the dtype of the products."""
    E, O, R = B_EOR.shape  # noqa: E741
    down = None if down_ERD is None else expert_rows(down_ERD, dtype, copies, "down").view(E, R, -1)
    return down, expert_rows(B_EOR, dtype, copies, "B", transpose=True).view(E, R, O)


def _products(rows_ND: Tensor, weights_EDF: Tensor, sizes: Sequence[int]) -> Tensor:
    """Multiply each expert's rows by its weight, (N, F)."""
    parts = zip(rows_ND.split(list(sizes)), weights_EDF, strict=True)
    return torch.cat([rows_eD @ weight_DF for rows_eD, weight_DF in parts])


def _outer(left_NF: Tensor, right_ND: Tensor, weight_EFD: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute the gradient of each expert's weight, (E, F, D), in its dtype; 0 for an expert without rows."""
    parts = zip(left_NF.split(list(sizes)), right_ND.split(list(sizes)), strict=True)
    return torch.stack([left_eF.T @ right_eD for left_eF, right_eD in parts]).to(weight_EFD.dtype)


def _unpermute(rows_NF: Tensor, slot_N: Tensor, shape_TK: torch.Size) -> Tensor:
    """Return rows to the order of their tokens, and add up the K of a token, (T, F)."""
    slots_NF = torch.empty_like(rows_NF)
    slots_NF[slot_N] = rows_NF
    return slots_NF.view(*shape_TK, rows_NF.shape[1]).sum(dim=1)
