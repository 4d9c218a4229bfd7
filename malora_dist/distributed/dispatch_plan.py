"""Which rows go to which rank, and how many each rank sends and receives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.distributed.all_to_all import AllToAll, named
from malora_dist.distributed.permutation import Permutation, permutations


@dataclass(frozen=True)
class DispatchPlan:
    """Rows of L layers with one input.

    sent_WL, received_WL: rows of layer l that go to rank w, and that come from it.
    stacked: the order of all layers' rows, by expert rank, then by layer.
    layers: the order of each layer's rows alone.
    """

    sent_WL: list[list[int]]
    received_WL: list[list[int]]
    stacked: Permutation
    layers: tuple[Permutation, ...]


def expert_rank_mask(expert_ids_LTK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Return whether rank w holds an expert that token t goes to in layer l, (W, L, T) bool."""
    ranks_LTK = expert_ids_LTK // (num_experts // num_ranks)
    mask_LTW = torch.zeros(*ranks_LTK.shape[:2], num_ranks, dtype=torch.bool, device=ranks_LTK.device)
    return mask_LTW.scatter_(2, ranks_LTK, True).permute(2, 0, 1).contiguous()


def make_plan(expert_ids_LTK: Sequence[Tensor], num_experts: int, all_to_all: AllToAll) -> DispatchPlan:
    """Plan L layers' rows over a group, with one exchange of counts, for which the host waits once.

    Args:
        expert_ids_LTK: the experts of each token, by layer.
        num_experts: of a layer, over all ranks.
        all_to_all: of the expert-parallel group.
    """
    W, L = dist.get_world_size(all_to_all.group), len(expert_ids_LTK)
    mask_WLT = expert_rank_mask(torch.stack(list(expert_ids_LTK)), num_experts, W)
    sent = mask_WLT.sum(dim=2)
    received = torch.empty_like(sent)
    with named(all_to_all.group, "counts"):
        dist.all_to_all_single(received, sent, group=all_to_all.group)
    all_to_all.count("counts", [1] * W, L * sent.element_size())
    sent_WL, received_WL = torch.stack([sent, received]).tolist()
    num_rows_L = [sum(counts) for counts in zip(*sent_WL, strict=True)]
    Q = min(expert_ids_LTK[0].shape[1], W)
    (stacked,) = permutations(mask_WLT.flatten(1)[None], [sum(num_rows_L)], Q)
    layers = (stacked,) if L == 1 else permutations(mask_WLT.transpose(0, 1).contiguous(), num_rows_L, Q)
    return DispatchPlan(sent_WL, received_WL, stacked, layers)
