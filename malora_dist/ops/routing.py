"""Routing: which experts a token goes to, and with what weight (MALoRA eq. 4).

What the paper leaves open is decided here: the router is a linear without bias or noise, on the undropped layer input,
one per adapted linear; logits, softmax and the product before them are in fp32, the products of their gradient in the
dtype of x; experts with equal probability are taken in the order of their number; the K kept weights are not
renormalised unless asked.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora_dist.ops.input_projection import router_logits
from malora_dist.ops.operators import operator

FEW = 4


class Routing(NamedTuple):
    """What a router decided for T tokens: weights of all experts, 0 where not chosen; the chosen; probabilities."""

    gates_TE: Tensor
    expert_ids_TK: Tensor
    probs_TE: Tensor

    @property
    def gates_TK(self) -> Tensor:
        """Return the weights of the chosen experts."""
        return self.gates_TE.gather(-1, self.expert_ids_TK)


def route(x_TI: Tensor, gate_EI: Tensor, top_k: int, normalize: bool = False) -> Routing:
    """Take the `top_k` largest of a softmax over all experts; probabilities and gates are fp32 (fp64 for fp64)."""
    return choose(router_logits(x_TI, [gate_EI]), top_k, normalize)


def choose(logits_TE: Tensor, top_k: int, normalize: bool = False) -> Routing:
    """Choose from the router's logits; a dimension before T is that of several routers."""
    return Routing(*_Choose.apply(logits_TE, top_k, normalize))


class _Choose(torch.autograd.Function):
    """One node, keeping the probabilities and the choice."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
        gates_TE, expert_ids_TK, probs_TE = choose_experts(logits_TE, top_k, normalize)
        ctx.normalize = normalize
        ctx.save_for_backward(probs_TE, expert_ids_TK)
        ctx.mark_non_differentiable(expert_ids_TK)
        ctx.set_materialize_grads(False)
        return gates_TE, expert_ids_TK, probs_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_gates_TE, _, grad_probs_TE = grads
        if grad_gates_TE is None and grad_probs_TE is None:
            return None, None, None
        return choose_experts_backward(*ctx.saved_tensors, grad_gates_TE, grad_probs_TE, ctx.normalize), None, None


def _choose(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    probs_TE = _softmax(logits_TE)
    expert_ids_TK = largest(probs_TE, top_k)
    gates_TE = torch.zeros_like(probs_TE).scatter_(-1, expert_ids_TK, probs_TE.gather(-1, expert_ids_TK))
    return gates_TE.div_(gates_TE.sum(dim=-1, keepdim=True)) if normalize else gates_TE, expert_ids_TK, probs_TE


def _choose_backward(
    probs_TE: Tensor, expert_ids_TK: Tensor, grad_gates_TE: Tensor | None, grad_probs_TE: Tensor | None, normalize: bool
) -> Tensor:
    grad_TE = grad_probs_TE
    if grad_gates_TE is not None:
        # Of the chosen alone. A mask, since scatter_add has no deterministic form on CUDA.
        chosen_TE = torch.zeros_like(probs_TE).scatter_(-1, expert_ids_TK, 1.0)
        if normalize:
            kept_TE = probs_TE * chosen_TE
            sums_T1 = kept_TE.sum(dim=-1, keepdim=True)
            inner_T1 = (grad_gates_TE * kept_TE).sum(dim=-1, keepdim=True) / sums_T1
            grad_gates_TE = (grad_gates_TE - inner_T1) / sums_T1
        grad_gates_TE = grad_gates_TE * chosen_TE
        grad_TE = grad_gates_TE if grad_TE is None else grad_gates_TE.add_(grad_TE)
    assert grad_TE is not None
    inner_T1 = (grad_TE * probs_TE).sum(dim=-1, keepdim=True)
    return torch.sub(grad_TE, inner_T1, out=empty_logits(probs_TE)).mul_(probs_TE)


def empty_logits(probs_TE: Tensor) -> Tensor:
    """Return room for logits (..., T, E); those of several routers lie side by side in a token's row."""
    if probs_TE.dim() == 2:
        return probs_TE.new_empty(probs_TE.shape)
    L, T, E = probs_TE.shape
    return probs_TE.new_empty(T, L, E).transpose(0, 1)


def _softmax(logits_TE: Tensor) -> Tensor:
    # On a CPU a short last dimension is several times as slow as two transpositions.
    if logits_TE.is_cpu:
        return logits_TE.mT.contiguous().softmax(dim=-2).mT.contiguous()
    return logits_TE.contiguous().softmax(dim=-1)


def largest(probs_TE: Tensor, top_k: int) -> Tensor:
    """Return the experts of the largest, (T, K), falling; of equal ones the lower first, which topk leaves open."""
    if top_k > FEW:
        return probs_TE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    left_TE, found = probs_TE, []
    for _ in range(top_k):
        found.append(left_TE.argmax(dim=-1, keepdim=True))
        if len(found) < top_k:
            left_TE = left_TE.scatter(-1, found[-1], -1.0)
    return torch.cat(found, dim=-1)


def _choose_kernel(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    from malora_dist.ops.routing_kernels import launch_forward

    return launch_forward(logits_TE, top_k, normalize)


def _choose_backward_kernel(
    probs_TE: Tensor, expert_ids_TK: Tensor, grad_gates_TE: Tensor | None, grad_probs_TE: Tensor | None, normalize: bool
) -> Tensor:
    from malora_dist.ops.routing_kernels import launch_backward

    grad_logits_TE = empty_logits(probs_TE)
    launch_backward(grad_logits_TE, probs_TE, expert_ids_TK, grad_gates_TE, grad_probs_TE, normalize)
    return grad_logits_TE


def _fake_choice(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits_TE.shape
    ids_TK = logits_TE.new_empty((*shape[:-1], top_k), dtype=torch.int64)
    return logits_TE.new_empty(shape), ids_TK, logits_TE.new_empty(shape)


# Gates, ids and probabilities from logits (..., T, E) of any strides.
choose_experts = operator(
    "choose_experts(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor, Tensor)",
    plain=_choose,
    kernel=_choose_kernel,
    fake=_fake_choice,
)

# The gradient of the logits from those of gates and probabilities, of which one may be missing.
choose_experts_backward = operator(
    "choose_experts_backward(Tensor probs, Tensor ids, Tensor? grad_gates, Tensor? grad_probs, bool normalize)"
    " -> Tensor",
    plain=_choose_backward,
    kernel=_choose_backward_kernel,
    fake=lambda probs, *_: empty_logits(probs),
)
