"""Load balance: the statistics of a router and the loss on them.

The paper names a balance loss and gives no formula; this is the usual N * sum_e f_e P_e (Switch, Mixtral), scaled so
that 1 is perfect balance for every top_k. f_e = count_e / (K T) has no gradient, P_e is the mean probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from malora_dist.ops.routing import Routing

EXACT_IN_FP32 = 2**24


class ExpertStatistics(NamedTuple):
    """Sums over tokens for L routers: how often each expert was chosen by each of G groups, and its probabilities.

    square_sum_L: of the squared logs of the sums of exponentials of logits, where routings hold them.
    """

    counts_GLE: Tensor
    prob_sum_LE: Tensor
    square_sum_L: Tensor | None = None


def expert_statistics(
    routings: Sequence[Routing], group_T: Tensor | None = None, num_groups: int = 1, mask_T: Tensor | None = None
) -> ExpertStatistics:
    """Sum up what routers chose for the same T tokens. `counts_GLE` carries no gradient.

    Args:
        routings: of L routers.
        group_T: each token's group (its task); None: all are of group 0.
        num_groups: G.
        mask_T: tokens where it is false, such as padding, never count.
    """
    ids_LTK = torch.stack([routing.expert_ids_TK for routing in routings])
    probs_LTE = torch.stack([routing.probs_TE for routing in routings])
    L, T, E = probs_LTE.shape
    weight_T = probs_LTE.new_ones(T) if mask_T is None else mask_T.to(probs_LTE.dtype)
    group_T = ids_LTK.new_zeros(T) if group_T is None else group_T
    cells_LN = (group_T[:, None] * E + ids_LTK).flatten(1)
    # Sums of ones: exact in fp32, so whatever the order in which a device adds them up.
    assert ids_LTK[0].numel() <= EXACT_IN_FP32
    counts = probs_LTE.new_zeros(L, num_groups * E)
    counts.scatter_add_(1, cells_LN, weight_T[:, None].expand(-1, ids_LTK.shape[2]).reshape(1, -1).expand(L, -1))
    log_sums = [routing.log_sum_T for routing in routings if routing.log_sum_T is not None]
    square_sum_L = torch.stack(log_sums).square() @ weight_T if log_sums else None
    prob_sum_LE = torch.einsum("t,lte->le", weight_T, probs_LTE)
    return ExpertStatistics(counts.view(L, num_groups, E).transpose(0, 1), prob_sum_LE, square_sum_L)


def token_mask(attention_mask: Tensor | None, T: int, device: torch.device) -> Tensor | None:
    """Return which of T rows are tokens that count, (T,); None where the mask (B, S) is not one of these rows."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.numel() != T:
        return None
    return attention_mask.reshape(-1).to(device) != 0


def load_balancing_loss(counts_LE: Tensor, prob_sum_LE: Tensor, num_tokens: Tensor | float, top_k: int) -> Tensor:
    """Compute N * sum_e f_e P_e for each of L routers, (L,). No token gives 0.

    Over several ranks pass counts and tokens summed over all of them, and this rank's own `prob_sum_LE`: the sum of
    the ranks' results is the loss of one process that saw all tokens.
    """
    tokens = torch.as_tensor(num_tokens, dtype=prob_sum_LE.dtype, device=prob_sum_LE.device).clamp(min=1)
    return balance_of_shares(counts_LE / (top_k * tokens), prob_sum_LE / tokens)


def balance_of_shares(share_LE: Tensor, mean_prob_LE: Tensor) -> Tensor:
    """Compute N * sum_e f_e P_e, (L,), from each expert's share of the choices and its mean probability."""
    return share_LE.shape[-1] * (share_LE * mean_prob_LE).sum(dim=-1)


def choice_shares(counts_LE: Tensor) -> Tensor:
    """Compute f, each expert's share of a router's choices, (L, E); all alike where nothing was counted."""
    total_L1 = counts_LE.sum(dim=-1, keepdim=True)
    return torch.where(total_L1 > 0, counts_LE / total_L1.clamp(min=1), 1 / max(1, counts_LE.shape[-1]))
