"""The base of a run on two and four processes: the same bits from everywhere, and who reads how much."""

import re
from typing import Any

import pytest

from tests.parallel.loading_workers import results


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize(("cache", "said"), [("prepared", ": prepared in "), ("empty", "quantised now")])
def test_every_process_has_the_bits_of_one_process(world_size: int, zero_stage: int, cache: str, said: str) -> None:
    for found in results(world_size):
        run = found["engine"][f"{zero_stage} {cache}"]
        assert run["same bits"] and said in run["said"]


def test_a_prepared_base_is_read_in_shares_under_zero_3_and_by_one_process_of_a_node_below() -> None:
    ranks: list[dict[str, Any]] = [found["large"]["engine"] for found in results(2)]
    assert all(run["same bits"] for rank in ranks for run in rank.values())
    whole = results(2)[0]["large"]["whole"] / 2**20
    read = [[float(re.findall(r"[\d.]+", run["said"])[-1]) for run in rank.values()] for rank in ranks]
    assert read == [pytest.approx([whole, whole / 2], abs=0.2), pytest.approx([0, whole / 2], abs=0.2)]
