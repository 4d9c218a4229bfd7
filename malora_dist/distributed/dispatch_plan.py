"""Where rows go: one row per (token, rank that owns an expert of it), and how many each rank sends and receives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.distributed.all_to_all import named


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


def owner_mask(expert_ids_LTK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Return whether rank w owns an expert that token t goes to in layer l, (W, L, T) bool."""
    owners_LTK = expert_ids_LTK // (num_experts // num_ranks)
    mask_LTW = torch.zeros(*owners_LTK.shape[:2], num_ranks, dtype=torch.bool, device=owners_LTK.device)
    return mask_LTW.scatter_(2, owners_LTK, True).permute(2, 0, 1).contiguous()


def positions(mask_LWT: Tensor, num_rows_L: Sequence[int], rows_per_token: int) -> tuple[Positions, ...]:
    """Return for each of L layers the order of the true cells of `mask_LWT`, of which there are `num_rows_L`."""
    _, owners, tokens = torch.nonzero_static(mask_LWT, size=sum(num_rows_L)).unbind(dim=1)
    row_LWT = (mask_LWT.flatten(1).cumsum(dim=1) - 1).view(mask_LWT.shape)
    none_L11 = mask_LWT.sum(dim=(1, 2), keepdim=True)
    slots_LTW = torch.where(mask_LWT, row_LWT, none_L11).transpose(1, 2).sort(dim=2).values
    of_layers = zip(
        owners.split(list(num_rows_L)), tokens.split(list(num_rows_L)), slots_LTW[..., :rows_per_token], strict=True
    )
    return tuple(Positions(owner_N, token_N, slots_TQ) for owner_N, token_N, slots_TQ in of_layers)


def make_routes(expert_ids_LTK: Sequence[Tensor], num_experts: int, group: dist.ProcessGroup) -> Routes:
    """Route L layers' tokens through `group`, with one exchange of counts, for which the host waits once."""
    W, L = dist.get_world_size(group), len(expert_ids_LTK)
    mask_WLT = owner_mask(torch.stack(list(expert_ids_LTK)), num_experts, W)
    sent = mask_WLT.sum(dim=2)
    received = torch.empty_like(sent)
    with named(group, "counts"):
        dist.all_to_all_single(received, sent, group=group)
    sent_WL, received_WL = torch.stack([sent, received]).tolist()
    num_rows_L = [sum(counts) for counts in zip(*sent_WL, strict=True)]
    Q = min(expert_ids_LTK[0].shape[1], W)
    (stacked,) = positions(mask_WLT.flatten(1)[None], [sum(num_rows_L)], Q)
    layers = (stacked,) if L == 1 else positions(mask_WLT.transpose(0, 1).contiguous(), num_rows_L, Q)
    return Routes(sent_WL, received_WL, stacked, layers)
