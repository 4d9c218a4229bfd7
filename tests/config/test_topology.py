import doctest

import pytest

from malora_dist.config import topology
from malora_dist.config.topology import (
    accumulation_steps,
    expert_data_parallel_ranks,
    expert_parallel_ranks,
    legal_world_sizes,
    local_experts,
)
from malora_dist.errors import TopologyError


def test_the_examples_in_the_docstrings() -> None:
    result = doctest.testmod(topology)
    assert result.attempted >= 5 and result.failed == 0


@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3), (16, 8)])
def test_groups_cover_all_ranks_and_cross_once(world_size: int, ep_size: int) -> None:
    ep, edp = expert_parallel_ranks(world_size, ep_size), expert_data_parallel_ranks(world_size, ep_size)
    assert sorted(rank for group in ep for rank in group) == list(range(world_size))
    assert sorted(rank for group in edp for rank in group) == list(range(world_size))
    assert all(len(set(one) & set(other)) == 1 for one in ep for other in edp)
    for group in ep:
        assert [expert for rank in group for expert in local_experts(rank, ep_size, 24)] == list(range(24))
    for group in edp:
        assert len({local_experts(rank, ep_size, 24) for rank in group}) == 1


def test_accumulation_and_the_worlds_that_fit() -> None:
    assert accumulation_steps(48, 2, 3) == 8
    for world in range(1, 20):
        if world in legal_world_sizes(48, 4):
            assert accumulation_steps(48, 4, world) * 4 * world == 48
        else:
            with pytest.raises(TopologyError):
                accumulation_steps(48, 4, world)
    assert legal_world_sizes(7, 2) == []


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((16, 4, 3), "global_batch_size 12 or 24, 2 or 4 processes"),
        ((30, 4, 3), "global_batch_size 24 or 36, per_device_train_batch_size 2"),
        ((2, 4, 1), "global_batch_size 4, per_device_train_batch_size 2"),
    ],
)
def test_the_nearest_values_are_named(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(TopologyError, match=f"Nearest that work: {message}$"):
        accumulation_steps(*numbers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_experts(0, 3, 8), "ep_size=3 must divide adapter.num_experts=8; the nearest that does is 2"),
        (lambda: expert_parallel_ranks(4, 3), "ep_size=3 must divide the number of processes=4"),
        (lambda: expert_data_parallel_ranks(4, 0), "ep_size=0 must divide"),
    ],
)
def test_what_does_not_divide(call: object, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        call()  # type: ignore[operator]
