"""Order of rows against a naive loop; numbers of rows over real processes."""

import pytest
import torch

from malora_dist.parallel.routes import owner_mask, positions
from tests.parallel.exchange_workers import results
from tests.reference import owners_reference


def _routings(T: int, E: int, K: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T + E + K)
    free = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]) if T else torch.zeros(0, K)
    ids = free.long().reshape(T, K)
    return ids if kind == "free" else torch.arange(E - K, E).expand(T, K)


@pytest.mark.parametrize("kind", ["free", "last experts"])
@pytest.mark.parametrize("T", [0, 1, 23])
@pytest.mark.parametrize(("E", "K", "W"), [(8, 2, 2), (8, 2, 4), (4, 4, 4), (4, 1, 4), (6, 5, 2), (5, 2, 1), (3, 3, 3)])
def test_rows_are_ordered_by_owner_then_by_token(E: int, K: int, W: int, T: int, kind: str) -> None:
    ids_TK = _routings(T, E, K, kind)
    owners = owners_reference(ids_TK.tolist(), E, W)
    mask_WT = owner_mask(ids_TK, E, W)
    assert mask_WT.tolist() == [[w in owners[t] for t in range(T)] for w in range(W)]
    rows = [(w, t) for w in range(W) for t in range(T) if w in owners[t]]
    place = positions(mask_WT, len(rows), min(K, W))
    assert place.token_N.tolist() == [t for _, t in rows]
    assert place.owner_N.tolist() == [w for w, _ in rows]
    slots = [[rows.index((w, t)) for w in owners[t]] for t in range(T)]
    assert place.slots_TQ.tolist() == [slot + [len(rows)] * (min(K, W) - len(slot)) for slot in slots]


def test_the_order_of_rows_is_found_without_reading_a_number() -> None:
    """Tensors of the meta device have none: whatever would make the host wait for them raises."""
    place = positions(owner_mask(torch.zeros(5, 2, dtype=torch.int64, device="meta"), 4, 2), 7, 2)
    assert (place.owner_N.shape, place.token_N.shape, place.slots_TQ.shape) == ((7,), (7,), (5, 2))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_knows_what_it_sends_and_what_it_receives(world_size: int) -> None:
    """Of every case below; the ranks' sent counts, laid side by side, are what the others received."""
    for rank in results(world_size):
        assert {name: errors["routes"] for name, errors in rank["cases"].items() if errors["routes"]} == {}
