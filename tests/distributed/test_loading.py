"""A base model on two and four processes: the same bits from everywhere, and who reads how much."""

import re
from typing import Any

import pytest

from tests.distributed.loading_workers import CASES, NODE_TIMEOUT, SHAPES, results
from tests.distributed.workers import DTYPES

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_part_read_alone_is_the_part_that_deepspeed_cuts(world_size: int) -> None:
    """Same size, padding, place and attributes, also where there are fewer elements than processes."""
    for found in results(world_size):
        assert found["parts"] == [True] * len(SHAPES) * len(DTYPES) * 2, "with and without offload_param"


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", list(CASES))
def test_a_model_read_in_parts_is_the_model(world_size: int, case: str) -> None:
    """Bit for bit, and in its logits; each process read and kept its own part alone."""
    for found in results(world_size):
        assert len(found["models"][case]) == 5 and all(found["models"][case].values()), found["models"][case]


def test_each_of_two_processes_reads_and_holds_half_of_a_prepared_base() -> None:
    """Of 35 MiB in 4 bits, and of the 120 MiB of the checkpoint nothing; the kernel counts the same bytes."""
    for found in results(2):
        large = found["large"]
        assert 34 * 2**20 < large["whole"] < 36 * 2**20
        assert 0.5 * large["whole"] - 2**16 < large["read"] < 0.5 * large["whole"] + 2**16
        assert large["read"] <= large["kernel"] < large["read"] + 2**16
        assert large["part"] - 2**22 < large["growth"] < large["part"] + 0.5 * large["whole"], large


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize(("cache", "said"), [("prepared", ": prepared in "), ("empty", "quantised now")])
def test_every_process_has_the_bits_of_one_process(world_size: int, zero_stage: int, cache: str, said: str) -> None:
    for found in results(world_size):
        run = found["engine"][f"{zero_stage} {cache}"]
        assert run["same bits"] and said in run["said"]
        assert found["own head"][f"{zero_stage} empty too"]["same bits"]


def test_a_prepared_base_is_read_in_shares_under_zero_3_and_by_one_process_of_a_node_below() -> None:
    ranks: list[dict[str, Any]] = [found["large"]["engine"] for found in results(2)]
    assert all(run["same bits"] for rank in ranks for run in rank.values())
    whole = results(2)[0]["large"]["whole"] / 2**20
    read = [[float(re.findall(r"[\d.]+", run["said"])[-1]) for run in rank.values()] for rank in ranks]
    assert read == [pytest.approx([whole, whole / 2], abs=0.2), pytest.approx([0, whole / 2], abs=0.2)]


def test_each_node_keeps_its_own_readers_values() -> None:
    blocks, turns = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank, found in enumerate(results(4)):
        assert found["nodes"]["blocks"] == {"ranks": blocks[rank], "own part": True}
        assert found["nodes"]["turns"] == {"ranks": turns[rank], "own part": True}


def test_groups_of_nodes_have_the_runs_timeout() -> None:
    for found in results(4):
        assert found["nodes"]["timeouts"] == [NODE_TIMEOUT, 60], "60 is the test's own"


def test_processes_of_one_machine_are_one_node() -> None:
    assert all(found["nodes"]["alone"] == [0, 1, 2, 3] for found in results(4))


def test_only_one_process_of_a_node_needs_the_files() -> None:
    reads = [found["nodes"]["model"].pop("reads") for found in results(4)]
    assert reads == [True, False, True, False]
    assert all(found["nodes"]["model"] == {"same bits": True} for found in results(4))
