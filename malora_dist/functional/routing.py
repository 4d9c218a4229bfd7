"""Which experts a token goes to, and with what weight (MALoRA eq. 4).

What the paper leaves open is decided here: the router is a linear without bias or noise, on the undropped layer input,
one per adapted linear; logits, softmax and the product before them are in fp32; experts with equal probability are
taken in the order of their number; the K kept weights are not renormalised unless asked.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided for T tokens: weights and numbers of the chosen experts, and all probabilities."""

    gates_TK: Tensor
    expert_ids_TK: Tensor
    probs_TE: Tensor


def route(x_TI: Tensor, gate_EI: Tensor, top_k: int, normalize: bool = False) -> Routing:
    """softmax over all experts, then the `top_k` largest. Probabilities and gates are fp32 (fp64 for fp64 input)."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    probs_TE = F.linear(x_TI.to(dtype), gate_EI.to(dtype)).softmax(dim=-1)
    # A stable sort, since topk leaves the order of equal values open.
    expert_ids_TK = probs_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates_TK = probs_TE.gather(1, expert_ids_TK)
    if normalize:
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    return Routing(gates_TK, expert_ids_TK, probs_TE)


def dense_gates(routing: Routing) -> Tensor:
    """(T, E): the gate where an expert was chosen, 0 elsewhere."""
    return torch.zeros_like(routing.probs_TE).scatter(1, routing.expert_ids_TK, routing.gates_TK)
