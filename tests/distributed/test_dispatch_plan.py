"""Order of rows against a naive loop; numbers of rows over real processes."""

import pytest
import torch

from malora_dist.distributed.dispatch_plan import owner_mask, positions
from tests.distributed.all_to_all_workers import results
from tests.reference import owners_reference


def _routings(T: int, E: int, K: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T + E + K)
    free = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]) if T else torch.zeros(0, K)
    ids = free.long().reshape(T, K)
    return ids if kind == "free" else torch.arange(E - K, E).expand(T, K)


@pytest.mark.parametrize("T", [0, 1, 23])
@pytest.mark.parametrize(("E", "K", "W"), [(8, 2, 2), (8, 2, 4), (4, 4, 4), (4, 1, 4), (6, 5, 2), (5, 2, 1), (3, 3, 3)])
def test_rows_are_ordered_by_owner_then_by_token(E: int, K: int, W: int, T: int) -> None:
    """In two layers, one of which visits the last experts alone."""
    ids_LTK = torch.stack([_routings(T, E, K, kind) for kind in ("free", "last experts")])
    mask_WLT = owner_mask(ids_LTK, E, W)
    owners_LT = [owners_reference(ids_TK.tolist(), E, W) for ids_TK in ids_LTK]
    assert mask_WLT.tolist() == [[[w in owners[t] for t in range(T)] for owners in owners_LT] for w in range(W)]
    rows_L = [[(w, t) for w in range(W) for t in range(T) if w in owners[t]] for owners in owners_LT]
    places = positions(mask_WLT.transpose(0, 1).contiguous(), [len(rows) for rows in rows_L], min(K, W))
    for place, rows, owners in zip(places, rows_L, owners_LT, strict=True):
        assert (place.owner_N.tolist(), place.token_N.tolist()) == ([w for w, _ in rows], [t for _, t in rows])
        slots = [[rows.index((w, t)) for w in owners[t]] for t in range(T)]
        assert place.slots_TQ.tolist() == [slot + [len(rows)] * (min(K, W) - len(slot)) for slot in slots]


def test_the_order_of_rows_is_found_without_reading_a_number() -> None:
    """Tensors of the meta device hold none: an operation for which the host would have to wait raises."""
    mask_WLT = owner_mask(torch.zeros(1, 5, 2, dtype=torch.int64, device="meta"), 4, 2)
    (place,) = positions(mask_WLT.transpose(0, 1), [7], 2)
    assert (place.owner_N.shape, place.token_N.shape, place.slots_TQ.shape) == ((7,), (7,), (5, 2))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_knows_what_it_sends_and_what_it_receives(world_size: int) -> None:
    """Of every case below; the ranks' sent counts, laid side by side, are what the others received."""
    for rank in results(world_size):
        assert {name: errors["routes"] for name, errors in rank["cases"].items() if errors["routes"]} == {}
