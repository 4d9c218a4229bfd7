"""The exchange of tokens: its parts in one process, and all of it over real processes against the naive twin."""

from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist.distributed.all_to_all import Combine, Spread, sum_slots
from malora_dist.distributed.dispatch_plan import Positions, owner_mask, positions
from tests.distributed.all_to_all_workers import results

WORLD_SIZES = [2, 4]
# T, E, K, W
PLACES = {
    "plain": (7, 8, 2, 4),
    "no-token": (0, 8, 2, 4),
    "one-token": (1, 4, 3, 4),
    "one-slot": (6, 8, 1, 4),
    "one-rank": (5, 3, 2, 1),
    "every-owner": (4, 4, 4, 4),
    "first-slot-only": (5, 8, 2, 2),
}


def _place(name: str) -> Positions:
    T, E, K, W = PLACES[name]
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K]
    if name == "first-slot-only":  # both experts of each token on one rank, not the same for all
        ids_TK = torch.tensor([0, 4])[torch.arange(T) % 2][:, None] + torch.arange(K)
    mask_WLT = owner_mask(ids_TK[None], E, W)
    (place,) = positions(mask_WLT.transpose(0, 1), [int(mask_WLT.sum())], min(K, W))
    return place


def _normal(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


@pytest.mark.parametrize("name", PLACES)
def test_a_token_is_the_base_plus_the_sum_of_its_rows(name: str) -> None:
    place = _place(name)
    T, N = len(place.slots_TQ), len(place.token_N)
    rows, base, x = _normal(N, 3), _normal(T, 3, seed=1), _normal(T, 3, seed=2)
    if name == "first-slot-only":
        assert bool((place.slots_TQ[:, 1:] == N).all())
    sums = torch.zeros(T, 3, dtype=torch.float64)
    for row, token in enumerate(place.token_N.tolist()):
        sums[token] += rows.detach()[row]
    torch.testing.assert_close(sum_slots(rows, place.slots_TQ), sums)
    torch.testing.assert_close(Combine.apply(base, rows, *_of(place)), base + sums)
    spread = Spread.apply(x, *_of(place))
    assert spread.tolist() == [x[token].tolist() for token in place.token_N]


@pytest.mark.parametrize("name", PLACES)
def test_gradients_equal_finite_differences(name: str) -> None:
    place = _place(name)
    T, N = len(place.slots_TQ), len(place.token_N)
    rows, base, x = _normal(N, 3), _normal(T, 3, seed=1), _normal(T, 3, seed=2)
    assert torch.autograd.gradcheck(lambda rows, base: sum_slots(rows, place.slots_TQ, base), (rows, base))
    assert torch.autograd.gradcheck(lambda x: Spread.apply(x, *_of(place)), (x,))
    assert torch.autograd.gradcheck(lambda base, rows: Combine.apply(base, rows, *_of(place)), (base, rows))


def _of(place: Positions) -> tuple[Tensor, Tensor]:
    return place.token_N, place.slots_TQ


def test_bf16_rows_are_added_in_fp32() -> None:
    """In bf16 256 + 1 is 256, so that adding row by row would stay there."""
    rows, base = torch.ones(2, 1).bfloat16(), torch.full((1, 1), 256.0).bfloat16()
    total = sum_slots(rows, torch.tensor([[0, 1]]), base)
    assert total.dtype == torch.bfloat16 and total.item() == 258


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("aspect", ["twin", "bits", "bytes"])
def test_odd_cases(aspect: str, world_size: int) -> None:
    """twin: outputs and every gradient equal the naive twin's, in float64, fp32 and bf16, by both forms of computation.
    bits: again, without overlap, with every linear for itself and with recomputation, every number is the same.
    bytes: what the formula says, what AllToAll counts and what was really handed over agree, phase by phase.
    """
    for rank in results(world_size):
        wrong = {name: errors[aspect] for name, errors in rank["cases"].items() if errors[aspect]}
        assert len(rank["cases"]) > 40 and wrong == {}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_case(world_size: int) -> None:
    for rank in results(world_size):
        assert rank["property"] == "", rank["property"]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_llama_equals_the_one_with_all_experts(world_size: int) -> None:
    """Logits and gradients; and linears that could share a tensor get their own where they are given different ones."""
    for rank in results(world_size):
        for kind in ("shared", "each for itself", "recomputing"):
            found: dict[str, Any] = rank["llama"][kind]
            assert found["logits"] < 1e-12, kind
            assert found["astray"] < 1e-12, kind
            assert max(found["gradients"].values()) < 1e-10, (kind, found["gradients"])


@pytest.mark.distributed
def test_linears_of_one_input_share_their_messages() -> None:
    """q, k and v: counts, rows and three returns; gate and up: counts, rows and two returns; down: three messages.

    Each of two blocks sends 5 + 4 + 3 messages in forward; in backward the same less the counts.
    """
    for rank in results(2):
        found = rank["llama"]
        assert [found[kind]["attention"] for kind in ("shared", "each for itself")] == [5, 9]
        assert found["shared"]["messages"] == 2 * (12 + 9)
        assert found["each for itself"]["messages"] == 2 * (18 + 12)
        assert found["recomputing"]["messages"] == 2 * (12 + 12 + 9)
