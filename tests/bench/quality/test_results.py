"""What results say: hits, losses of the choice, what a run costs."""

import math
from pathlib import Path

import numpy as np
import pytest

from malora_dist.bench.quality.cost import cost_lines, seconds_of
from malora_dist.bench.quality.results import Result, read_results
from malora_dist.bench.quality.schedule import planned
from malora_dist.errors import DataError
from tests.bench.quality.suites import TINY, result, results_of, tiny_bench


def test_hits_and_losses_of_choices() -> None:
    rows = [{"label": 1, "scores": [-3.0, -1.0], "lengths": [1, 1]}, {"label": 0, "scores": [-2.0, -2.0 + math.log(3)]}]
    found = Result({"questions": {"a": rows}, "status": "finished"})
    assert found.hits("a").tolist() == [1.0, 0.0]
    np.testing.assert_allclose(found.choice_losses("a"), [math.log(1 + math.exp(-2)), math.log(4)])


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text('{"id": ')
    with pytest.raises(DataError, match=r"a.json is no result of a run"):
        read_results(tmp_path)


def test_cost_is_that_of_the_base_run_then_of_runs_of_the_same_method(tmp_path: Path) -> None:
    """The base's run: 4 steps of 1 s by the clock, 2 processors busy, so 8 s, and no scoring beside them."""
    bench = tiny_bench(tmp_path, TINY)
    runs = planned(bench, {})
    assert seconds_of(runs[1], {}) is None
    assert "not measured yet" in "".join(cost_lines(runs, {}))
    base = results_of(runs[:1], lambda run: 0.5)
    assert seconds_of(runs[1], base) == pytest.approx(2 * 2 * 1.0)
    alone = next(run for run in runs if run.task == "colour")
    assert seconds_of(alone, base) == pytest.approx(2 * 2 * 0.5), "half of the samples a step"
    slow = result(runs[1], 0.5)
    slow.record["seconds"]["cpu"] = 100.0
    known = base | {runs[1].id: slow}
    assert seconds_of(runs[1], known) == 100.0
    lines = list(cost_lines(runs, known, 2))
    assert lines[0].startswith("tiny: 2 runs done, 4 left: ") and "with 2 at a time" in lines[1]
