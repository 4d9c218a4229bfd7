"""The dispatch of tokens over real processes against the naive twin."""

from typing import Any

import pytest

from tests.distributed.all_to_all_workers import results

WORLD_SIZES = [2, 4]


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
