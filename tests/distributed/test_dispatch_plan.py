"""The order of rows against a naive loop; numbers of rows over real processes."""

import pytest
import torch

from malora_dist.distributed.dispatch_plan import expert_rank_mask
from malora_dist.distributed.permutation import permutations
from tests.distributed.all_to_all_workers import results
from tests.reference import expert_ranks_reference


def _routings(T: int, E: int, K: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T + E + K)
    free = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]) if T else torch.zeros(0, K)
    ids = free.long().reshape(T, K)
    return ids if kind == "free" else torch.arange(E - K, E).expand(T, K)


@pytest.mark.parametrize("T", [0, 1, 23])
@pytest.mark.parametrize(("E", "K", "W"), [(8, 2, 2), (8, 2, 4), (4, 4, 4), (4, 1, 4), (6, 5, 2), (5, 2, 1), (3, 3, 3)])
def test_rows_are_ordered_by_expert_rank_then_by_token(E: int, K: int, W: int, T: int) -> None:
    """In two layers, one of which visits the last experts alone."""
    ids_LTK = torch.stack([_routings(T, E, K, kind) for kind in ("free", "last experts")])
    mask_WLT = expert_rank_mask(ids_LTK, E, W)
    ranks_LT = [expert_ranks_reference(ids_TK.tolist(), E, W) for ids_TK in ids_LTK]
    assert mask_WLT.tolist() == [[[w in ranks[t] for t in range(T)] for ranks in ranks_LT] for w in range(W)]
    rows_L = [[(w, t) for w in range(W) for t in range(T) if w in ranks[t]] for ranks in ranks_LT]
    found = permutations(mask_WLT.transpose(0, 1).contiguous(), [len(rows) for rows in rows_L], min(K, W))
    for order, rows, ranks in zip(found, rows_L, ranks_LT, strict=True):
        assert (order.rank_N.tolist(), order.token_N.tolist()) == ([w for w, _ in rows], [t for _, t in rows])
        own = [[rows.index((w, t)) for w in ranks[t]] for t in range(T)]
        assert order.row_TQ.tolist() == [each + [len(rows)] * (min(K, W) - len(each)) for each in own]


def test_the_order_of_rows_is_found_without_reading_a_number() -> None:
    """Tensors of the meta device hold none: an operation for which the host would have to wait raises."""
    mask_WLT = expert_rank_mask(torch.zeros(1, 5, 2, dtype=torch.int64, device="meta"), 4, 2)
    (order,) = permutations(mask_WLT.transpose(0, 1), [7], 2)
    assert (order.rank_N.shape, order.token_N.shape, order.row_TQ.shape) == ((7,), (7,), (5, 2))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_knows_what_it_sends_and_what_it_receives(world_size: int) -> None:
    """Of every case below; the ranks' sent counts, laid side by side, are what the others received."""
    for rank in results(world_size):
        assert {name: errors["plan"] for name, errors in rank["cases"].items() if errors["plan"]} == {}
