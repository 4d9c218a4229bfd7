"""The sum over experts, computed two ways: y = base + s * sum_t g_t B_t C_t h, or the sum alone without a base.

h is what enters an expert (S_A x for MALoRA and HydraLoRA, x for the others) and C_t its first factor (P_t or A_t;
HydraLoRA has none: its `core` is None and D is R).
`dense_experts` multiplies all experts and masks by the gates: no sort, static shapes, no host synchronisation. Best
while E*R is small. `grouped_experts` multiplies only the chosen rows, sorted by expert. Best when E*R is large.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.functional.routing import Routing

MOVE_COST = 64


def dense_experts(
    base_TO: Tensor | None,
    h_TD: Tensor,
    core_ERD: Tensor | None,
    B_EOR: Tensor,
    gates_TE: Tensor | None,
    scaling: float,
) -> Tensor:
    """(T, O), all experts as two products. `gates_TE` is 0 where an expert was not chosen; without it all weigh 1."""
    num_experts, out_features, r = B_EOR.shape
    z_TN = h_TD.repeat(1, num_experts) if core_ERD is None else F.linear(h_TD, core_ERD.flatten(0, 1))
    if gates_TE is not None:
        z_TN = (z_TN.unflatten(1, (num_experts, r)) * gates_TE.to(z_TN.dtype)[:, :, None]).flatten(1)
    B_NO = B_EOR.transpose(1, 2).reshape(num_experts * r, out_features)
    return (z_TN * scaling) @ B_NO if base_TO is None else torch.addmm(base_TO, z_TN, B_NO, alpha=scaling)


def grouped_experts(
    base_TO: Tensor | None, h_TD: Tensor, core_ERD: Tensor | None, B_EOR: Tensor, routing: Routing, scaling: float
) -> Tensor:
    """(T, O), one product per expert and factor over the rows routed to it.

    Every expert takes part in the products, with no row if need be, so that each rank's backward touches every
    parameter. Rows return home by a permutation and a sum over K in order: deterministic, unlike index_add on CUDA.
    """
    T, K = routing.expert_ids_TK.shape
    slots = routing.expert_ids_TK.reshape(-1)
    order = slots.argsort(stable=True)
    sizes = torch.bincount(slots, minlength=len(B_EOR)).tolist()
    rows = h_TD[:, None, :].expand(T, K, -1).flatten(0, 1)[order]
    gates = routing.gates_TK.reshape(-1)[order].to(h_TD.dtype)[:, None]
    cores = [None] * len(B_EOR) if core_ERD is None else core_ERD
    outputs = [
        F.linear((rows_e if core_RD is None else F.linear(rows_e, core_RD)) * gates_e, B_OR)
        for rows_e, gates_e, core_RD, B_OR in zip(rows.split(sizes), gates.split(sizes), cores, B_EOR, strict=True)
    ]
    delta_TKO = torch.cat(outputs)[order.argsort()].view(T, K, B_EOR.shape[1])
    delta_TO = delta_TKO.sum(dim=1)
    return delta_TO * scaling if base_TO is None else torch.add(base_TO, delta_TO, alpha=scaling)


def prefer_grouped(num_experts: int, top_k: int, r: int, in_width: int, out_width: int) -> bool:
    """Whether `grouped_experts` is the cheaper form, by counting the work of a token.

    Both forms spend R (D + O) multiplications per expert they compute. Grouped computes K of E, but moves K rows of
    D + O numbers there and back; moving a number costs about as much as `MOVE_COST` multiplications in a GEMM
    (measured: the forms break even near E*R = 250 at K = 2).
    """
    dense = num_experts * r * (in_width + out_width)
    grouped = top_k * r * (in_width + out_width) + MOVE_COST * top_k * (in_width + 2 * out_width)
    return grouped < dense
