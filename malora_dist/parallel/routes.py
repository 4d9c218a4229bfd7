"""Where rows go: one row per (token, rank that owns an expert of it), and how many each rank sends and receives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.parallel.exchange import named


@dataclass(frozen=True)
class Positions:
    """Order of N rows: by owning rank, then by token.

    owner_N and token_N are each row's owner and token. slots_TQ are the rows of each token in the order of owners; N
    stands for none, which only follows a token's real rows. Q = min(top_k, W) for W ranks.
    """

    owner_N: Tensor
    token_N: Tensor
    slots_TQ: Tensor


@dataclass(frozen=True)
class Routes:
    """Rows of L layers with one input: `sent_WL[w][l]` of layer l go to rank w, `received_WL[w][l]` come from it.

    `stacked` orders the rows of all layers by owner, then by layer; `layers` holds the order of each layer's rows
    alone.
    """

    sent_WL: list[list[int]]
    received_WL: list[list[int]]
    stacked: Positions
    layers: tuple[Positions, ...]


def owner_mask(expert_ids_TK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """(W, T) bool: whether rank w owns an expert that token t goes to."""
    owners_TK = expert_ids_TK // (num_experts // num_ranks)
    mask_TW = torch.zeros(len(owners_TK), num_ranks, dtype=torch.bool, device=owners_TK.device)
    return mask_TW.scatter_(1, owners_TK, True).T


def positions(mask_WT: Tensor, num_rows: int, rows_per_token: int) -> Positions:
    """Order of the true cells of `mask_WT`, of which there are `num_rows`."""
    owner_N, token_N = torch.nonzero_static(mask_WT, size=num_rows).unbind(dim=1)
    row_WT = (mask_WT.flatten().cumsum(0) - 1).view(mask_WT.shape)
    slots_TW = row_WT.masked_fill(~mask_WT, num_rows).T.sort(dim=1).values
    return Positions(owner_N, token_N, slots_TW[:, :rows_per_token])


def make_routes(expert_ids_LTK: Sequence[Tensor], num_experts: int, group: dist.ProcessGroup) -> Routes:
    """Routes of L layers' tokens through `group`, with one exchange of counts, for which the host waits once."""
    W, L = dist.get_world_size(group), len(expert_ids_LTK)
    masks = [owner_mask(ids_TK, num_experts, W) for ids_TK in expert_ids_LTK]
    sent = torch.stack([mask_WT.sum(dim=1) for mask_WT in masks], dim=1)
    received = torch.empty_like(sent)
    with named(group, "counts"):
        dist.all_to_all_single(received, sent, group=group)
    sent_WL, received_WL = torch.stack([sent, received]).tolist()
    Q = min(expert_ids_LTK[0].shape[1], W)
    layers = tuple(positions(mask, sum(row[layer] for row in sent_WL), Q) for layer, mask in enumerate(masks))
    total = sum(map(sum, sent_WL))
    stacked = layers[0] if L == 1 else positions(torch.cat(masks, dim=1), total, Q)
    return Routes(sent_WL, received_WL, stacked, layers)
