"""Cross-entropy of a frozen linear's outputs, without ever holding all of them.

Letters beside the package's: N supervised tokens, H the model's width, V its vocabulary, C rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def linear_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk: int
) -> Tensor:
    """Compute -log softmax(h W^T + bias)[target] of each row, (N,) in fp32 (fp64 for fp64), `chunk` rows at a time.

    The product runs in the dtype of hidden, the softmax in fp32. A gradient for hidden is made here, in forward, so
    that backward needs neither the weight nor logits: (N, H) numbers are kept.

    Raises:
        ValueError: weight or bias requires a gradient, which they never get; there is not a target for each row; or
            hidden is fp16, where the gradient could overflow.
    """
    if weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ValueError("linear_cross_entropy gives no gradient to weight and bias; freeze them")
    if hidden_NH.dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy takes {', '.join(map(str, DTYPES))}, not {hidden_NH.dtype}")
    if len(targets_N) != len(hidden_NH):
        raise ValueError(f"{len(targets_N)} targets for {len(hidden_NH)} rows")
    wanted = hidden_NH.requires_grad and torch.is_grad_enabled()
    losses: Tensor = _LinearCrossEntropy.apply(hidden_NH, weight_VH, bias_V, targets_N, chunk, wanted)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk: int,
        wanted: bool,
    ) -> Tensor:
        N, V = len(hidden_NH), len(weight_VH)
        fine = torch.promote_types(hidden_NH.dtype, torch.float32)
        losses_N = hidden_NH.new_empty(N, dtype=fine)
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        sums_N = torch.empty_like(losses_N)
        logits_CV = hidden_NH.new_empty(min(chunk, N), V)
        fine_CV = logits_CV if hidden_NH.dtype == fine else torch.empty_like(logits_CV, dtype=fine)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            size = rows.stop - start
            _product(hidden_NH[rows], weight_VH, bias_V, out=logits_CV[:size])
            _exponentials(logits_CV[:size], fine_CV[:size], targets_N[rows], losses_N[rows], sums_N[rows])
            if gradient_NH is not None:
                slope_CV = _slope(fine_CV[:size], targets_N[rows], sums_N[rows])
                torch.mm(logits_CV[:size].copy_(slope_CV), weight_VH, out=gradient_NH[rows])
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH, sums_N)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        gradient_NH, sums_N = ctx.saved_tensors
        result_NH = torch.mul(gradient_NH, (grads[0] / sums_N)[:, None], out=torch.empty_like(gradient_NH))
        return result_NH, None, None, None, None, None


def _product(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out: Tensor) -> None:
    if bias_V is None:
        torch.mm(hidden_CH, weight_VH.t(), out=out)
    else:
        torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=out)


def _exponentials(logits_CV: Tensor, fine_CV: Tensor, targets_C: Tensor, losses_C: Tensor, sums_C: Tensor) -> None:
    """Write exp(logits - their largest) to fine_CV, its sums over V to sums_C, and the cross-entropies to losses_C."""
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    if fine_CV.data_ptr() != logits_CV.data_ptr():
        fine_CV.copy_(logits_CV)
    fine_CV.sub_(largest_C1)
    target_C = fine_CV.gather(1, targets_C[:, None])[:, 0]
    torch.sum(fine_CV.exp_(), dim=1, out=sums_C)
    torch.sub(sums_C.log(), target_C, out=losses_C)


def _slope(exponentials_CV: Tensor, targets_C: Tensor, sums_C: Tensor) -> Tensor:
    """Compute in place the derivative by the logits times the sum: exp - sum x (1 at the target).

    Dividing by the sum only in backward saves a pass over (C, V).
    """
    return exponentials_CV.scatter_add_(1, targets_C[:, None], -sums_C[:, None])
