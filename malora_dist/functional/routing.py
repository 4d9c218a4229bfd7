"""Which experts a token goes to, and with what weight (MALoRA eq. 4).

What the paper leaves open is decided here: the router is a linear without bias or noise, on the undropped layer input,
one per adapted linear; logits, softmax and the product before them are in fp32, the products of their gradient in the
dtype of x; experts with equal probability are taken in the order of their number; the K kept weights are not
renormalised unless asked.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from malora_dist.functional.entrance import router_logits

FEW = 4


class Routing(NamedTuple):
    """What a router decided for T tokens: weights of all experts, 0 where not chosen; the chosen; probabilities."""

    gates_TE: Tensor
    expert_ids_TK: Tensor
    probs_TE: Tensor

    @property
    def gates_TK(self) -> Tensor:
        """The weights of the chosen experts."""
        return self.gates_TE.gather(-1, self.expert_ids_TK)


def route(x_TI: Tensor, gate_EI: Tensor, top_k: int, normalize: bool = False) -> Routing:
    """softmax over all experts, then the `top_k` largest. Probabilities and gates are fp32 (fp64 for fp64 input)."""
    return choose(router_logits(x_TI, [gate_EI]), top_k, normalize)


def choose(logits_TE: Tensor, top_k: int, normalize: bool = False) -> Routing:
    """The same from the router's logits; dimensions before T are those of several routers."""
    return Routing(*_Choose.apply(logits_TE, top_k, normalize))


class _Choose(torch.autograd.Function):
    """One node at the cost of a few passes over (T, E). Keeps the probabilities, the choice, and normalised gates."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
        probs_TE = _softmax(logits_TE)
        expert_ids_TK = largest(probs_TE, top_k)
        gates_TE = torch.zeros_like(probs_TE).scatter_(-1, expert_ids_TK, probs_TE.gather(-1, expert_ids_TK))
        sums_T1 = gates_TE.sum(dim=-1, keepdim=True) if normalize else None
        if sums_T1 is not None:
            gates_TE.div_(sums_T1)
        ctx.save_for_backward(probs_TE, expert_ids_TK, gates_TE if normalize else None, sums_T1)
        ctx.mark_non_differentiable(expert_ids_TK)
        return gates_TE, expert_ids_TK, probs_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probs_TE, expert_ids_TK, gates_TE, sums_T1 = ctx.saved_tensors
        grad_gates_TE, _, grad_probs_TE = grads
        if gates_TE is not None:
            inner_T1 = (grad_gates_TE * gates_TE).sum(dim=-1, keepdim=True)
            grad_gates_TE = (grad_gates_TE - inner_T1) / sums_T1
        chosen = grad_gates_TE.gather(-1, expert_ids_TK)
        grad_TE = grad_probs_TE.scatter_add(-1, expert_ids_TK, chosen)
        inner_T1 = (grad_TE * probs_TE).sum(dim=-1, keepdim=True)
        return (grad_TE - inner_T1).mul_(probs_TE), None, None


def _softmax(logits_TE: Tensor) -> Tensor:
    # On a CPU a short last dimension is several times as slow as two transpositions.
    return logits_TE.mT.contiguous().softmax(dim=-2).mT.contiguous() if logits_TE.is_cpu else logits_TE.softmax(dim=-1)


def largest(probs_TE: Tensor, top_k: int) -> Tensor:
    """(T, K) numbers of the largest, falling; of equal ones the lower number first, which topk leaves open."""
    if top_k > FEW:
        return probs_TE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    left_TE, found = probs_TE, []
    for _ in range(top_k):
        found.append(left_TE.argmax(dim=-1, keepdim=True))
        if len(found) < top_k:
            left_TE = left_TE.scatter(-1, found[-1], -1.0)
    return torch.cat(found, dim=-1)
