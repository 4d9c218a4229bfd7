"""Experts over two real processes: slices, repeatability, generation, resume, and the field's silent failures.

That gradients of experts are not multiplied by ep_size, that clipping counts every expert once, and that S_A's gradient
is whole and single is shown by `tests/test_topologies.py`, which compares each with one process.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.expert_workers import NEW_TOKENS, PROMPT_LENGTHS
from tests.multiprocess import run_distributed
from tests.training.workers import make_model

pytestmark = pytest.mark.distributed

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("experts")
    make_model(Path(folder))
    return run_distributed("tests.distributed.expert_workers:find_out", 2, folder=str(folder))


def test_each_rank_owns_its_own_experts(results: Results) -> None:
    """The bits of one process's model: step 0 does not depend on ep_size, and no rank holds the first experts twice."""
    for rank in results:
        assert rank["owned"] and all(rank["owned"].values()), rank["owned"]


def test_runs_repeat_bit_for_bit(results: Results) -> None:
    for rank in results:
        assert rank["repeats"]["again"] and rank["repeats"]["recomputed"], rank["repeats"]


def test_ranks_may_generate_different_lengths(results: Results) -> None:
    for number, rank in enumerate(results):
        assert rank["generated"]["ours"] == rank["generated"]["alone"]
        assert len(rank["generated"]["ours"]) == PROMPT_LENGTHS[number] + NEW_TOKENS - 7 * number


def test_marks_that_deepspeed_would_not_go_by_are_refused(results: Results) -> None:
    """With the classic marks of its own expert layers alone, ZeRO-3 would mix the experts of different ranks."""
    for rank in results:
        said = rank["refusals"]
        for case in ("classic at 3", "none at 3"):
            assert "is partitioned over ranks [0, 1], it belongs on [" in said[case], said
        for case in ("none at 1", "none at 0"):
            assert said[case], said


def test_moments_survive_a_resume(results: Results) -> None:
    for rank in results:
        found = rank["resumed"]
        assert found["same moments"] and found["nonzero"]
        assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-6)
