"""Bytes of the exchange against a count message by message, over every set of experts a token can choose."""

from itertools import combinations

import pytest

from malora_dist.plan.communication import exchange_bytes, rows_per_token
from tests.reference import exchange_bytes_reference, expert_ranks_reference

SIZES = [(E, K, W) for E in (4, 6, 8) for K in range(1, E + 1) for W in (1, 2, 4, 8) if E % W == 0]
PHASES = ("counts", "rows", "returns", "grad_returns", "grad_rows")


@pytest.mark.parametrize(("num_experts", "top_k", "ep_size"), SIZES)
def test_rows_per_token_is_the_mean_over_every_set_of_experts(num_experts: int, top_k: int, ep_size: int) -> None:
    sets = list(combinations(range(num_experts), top_k))
    rows = sum(map(len, expert_ranks_reference(sets, num_experts, ep_size)))
    assert rows_per_token(num_experts, top_k, ep_size) == pytest.approx(rows / len(sets), rel=1e-12)


@pytest.mark.parametrize(("backward", "recompute"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize(("num_experts", "top_k", "ep_size"), [(4, 2, 2), (8, 2, 4), (6, 3, 2), (4, 4, 4), (8, 1, 8)])
def test_every_leg_equals_a_count_of_messages(
    num_experts: int, top_k: int, ep_size: int, backward: bool, recompute: bool
) -> None:
    """Rank w has tokens of the first 3 w + 1 sets, so that all pairs of ranks exchange different numbers of rows."""
    sets = list(combinations(range(num_experts), top_k))
    tokens = [sets[: 3 * rank + 1] for rank in range(ep_size)]
    sizes = {"in_width": 7, "out_width": 19, "itemsize": 2, "gate_itemsize": 4}
    passes = {"forwards": 2 if backward and recompute else 1, "backwards": int(backward)}
    wanted = exchange_bytes_reference(tokens, num_experts, **sizes, **passes)
    rows = [[0] * ep_size for _ in range(ep_size)]
    for source in range(ep_size):
        for rank in sum(expert_ranks_reference(tokens[source], num_experts, ep_size), []):
            rows[source][rank] += 1
    for rank in range(ep_size):
        others = [other for other in range(ep_size) if other != rank]
        found = exchange_bytes(
            [rows[rank][other] for other in others],
            [rows[other][rank] for other in others],
            num_local_experts=num_experts // ep_size,
            backward=backward,
            recompute=recompute,
            **sizes,
        )
        assert {phase: getattr(found, phase) for phase in PHASES} == wanted[rank], rank
        assert found.total == sum(wanted[rank].values())
