"""Which runs a suite needs, from its results alone."""

from pathlib import Path

import pytest

from malora_dist.bench.quality.pilot import PILOT, kept_tasks, piloted
from malora_dist.bench.quality.runs import BASE, Bench, Run
from malora_dist.bench.quality.schedule import (
    COMPARISON,
    EXTENSION,
    FINAL,
    GRID,
    MIDDLE,
    foreseen,
    next_rate,
    planned,
    rate_grid,
)
from tests.bench.quality.suites import TINY, results_of, tiny_bench

TASKS = ("colour", "animal")
PILOTED = TINY | {"pilot": {"keep": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suite")


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return tiny_bench(folder)


def names(runs: list[Run], stage: str) -> list[tuple[str, str | None, float, int]]:
    return [(run.method, run.task, run.rate, run.seed) for run in runs if run.stage == stage]


def test_without_results_base_and_grids_are_planned(bench: Bench) -> None:
    runs = planned(bench, {})
    assert [run.stage for run in runs] == [BASE, *[MIDDLE] * 4, GRID]
    assert names(runs, MIDDLE)[:2] == [("lora", None, 0.002, 1), ("molora", None, 0.001, 1)]
    assert names(runs, MIDDLE)[2:] == [("alone", "colour", 0.001, 1), ("alone", "animal", 0.001, 1)]
    assert names(runs, GRID) == [("lora", None, 0.001, 1)]
    assert len({run.id for run in runs}) == len(runs)


def test_a_best_rate_at_an_edge_extends_the_grid_until_it_is_inside(folder: Path) -> None:
    bench = tiny_bench(folder, TINY | {"grid": {"factor": 2, "extensions": 4}})
    scores = {0.001: 0.3, 0.002: 0.5, 0.004: 0.6, 0.008: 0.4}
    done = results_of(planned(bench, {}), lambda run: scores[run.rate])
    extended = planned(bench, done)
    assert ("lora", None, 0.004, 1) in names(extended, EXTENSION)
    assert not [run for run in extended if run.stage == COMPARISON and run.method in ("lora", "rslora")]
    for _ in range(2):
        done = results_of(planned(bench, done), lambda run: scores.get(run.rate, 0.1))
    grid = rate_grid(bench, bench.suite.method("lora"), TASKS, done)
    assert grid.best == 0.004 and sorted(grid.scores) == [0.001, 0.002, 0.004, 0.008]


def test_extensions_are_limited(bench: Bench) -> None:
    """The best rate stays at the edge: after `extensions` of them the search ends, with the edge as the best."""
    done = results_of(planned(bench, {}), lambda run: min(1.0, 100 * run.rate))
    for _ in range(3):
        done = results_of(planned(bench, done), lambda run: min(1.0, 100 * run.rate))
    grid = rate_grid(bench, bench.suite.method("lora"), TASKS, done)
    assert grid.best == 0.004 and not grid.wanted


def test_settled_methods_are_compared_with_all_seeds_and_final_runs_only_on_demand(bench: Bench) -> None:
    done = results_of(planned(bench, {}), lambda run: 0.5)
    for _ in range(3):
        done = results_of(planned(bench, done), lambda run: 0.5)
    runs = planned(bench, done)
    compared = names(runs, COMPARISON)
    assert ("rslora", None, 0.0005, 1) in compared and ("lora", None, 0.0005, 2) in compared
    assert not names(runs, FINAL) and all(run.split == "validation" for run in runs)


def test_failed_runs_count_as_worst_and_are_not_made_again(bench: Bench) -> None:
    done = results_of(planned(bench, {}), lambda run: None if run.rate == 0.002 else 0.5)
    grid = rate_grid(bench, bench.suite.method("lora"), TASKS, done)
    assert grid.scores == {0.001: 0.5, 0.002: float("-inf")} and grid.wanted == (0.0005,)
    everything_failed = results_of(planned(bench, {}), lambda run: None)
    assert rate_grid(bench, bench.suite.method("lora"), TASKS, everything_failed).best is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1.0: 0.1, 2.0: 0.3, 4.0: 0.2}, None),
        ({1.0: 0.1, 2.0: 0.3}, 4.0),
        ({1.0: 0.3, 2.0: 0.3}, 0.5),
        ({3e-4: 0.3}, 6e-4),
    ],
)
def test_next_rate(scores: dict[float, float], expected: float | None) -> None:
    assert next_rate(scores, 2) == expected


def test_an_id_follows_from_what_decides_the_numbers(bench: Bench, folder: Path) -> None:
    """Another number of threads gives the same runs, another length gives others."""
    ids = [run.id for run in planned(bench, {})]
    assert ids == [run.id for run in planned(tiny_bench(folder, TINY | {"threads": 1, "about": "else"}), {})]
    recipe = TINY["recipe"] | {"train": TINY["recipe"]["train"] | {"max_steps": 3}}
    longer = planned(tiny_bench(folder, TINY | {"recipe": recipe}), {})
    assert not set(ids[1:]) & {run.id for run in longer}


def test_nothing_but_the_pilot_is_planned_before_it_is_done(folder: Path) -> None:
    """Then the task that moves is learned, and its run of the pilot is one of the grid's."""
    bench = tiny_bench(folder, PILOTED)
    before = planned(bench, {})
    assert [run.stage for run in before] == [BASE, PILOT, PILOT]
    assert kept_tasks(bench, {}) is None
    done = results_of(before, lambda run: {None: 0.1, "colour": 0.2, "animal": 0.9}[run.task])
    assert [(one.task, one.moves(0.95)) for one in piloted(bench, done)] == [("colour", False), ("animal", True)]
    assert kept_tasks(bench, done) == ("animal",)
    after = planned(bench, done)
    assert all(run.tasks == ("animal",) for run in after[3:])
    assert names(after, MIDDLE) == [("lora", None, 0.002, 1), ("molora", None, 0.001, 1)]


def test_a_task_that_is_learned_completely_is_kept_only_to_fill_up(folder: Path) -> None:
    bench = tiny_bench(folder, PILOTED)
    done = results_of(planned(bench, {}), lambda run: {None: 0.1, "colour": 1.0, "animal": 0.9}[run.task])
    assert kept_tasks(bench, done) == ("animal",)
    both = tiny_bench(folder, TINY | {"pilot": {"keep": 2}})
    done = results_of(planned(both, {}), lambda run: {None: 0.1, "colour": 1.0, "animal": 0.1}[run.task])
    assert kept_tasks(both, done) == ("colour", "animal")


def test_other_rows_of_a_task_are_other_runs(tmp_path: Path) -> None:
    before = {run.id for run in planned(tiny_bench(tmp_path), {})}
    rows = tmp_path / "data" / "colour" / "validation.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    same = before & {run.id for run in planned(tiny_bench(tmp_path), {})}
    assert len(same) == 1 and "alone_animal" in same.pop()


def test_final_runs_are_at_the_best_rates_with_their_own_seeds_on_test(bench: Bench) -> None:
    done = results_of(planned(bench, {}), lambda run: 0.5)
    for _ in range(3):
        done = results_of(planned(bench, done), lambda run: 0.5)
    runs = [run for run in planned(bench, done, final=True) if run.stage == FINAL]
    assert {(run.split, run.seed, run.method) for run in runs} == {
        ("test", 3, name) for name in ("lora", "molora", "alone", "rslora")
    }
    config = bench.config(runs[0], bench.out / "run")
    assert config.evaluation.split == "test" and config.data.tasks[0].validation is None
    assert config.data.tasks[0].test == (str(bench.out / "tasks" / "tiny" / "colour" / "test.jsonl"),)


def test_what_will_follow_is_foreseen_for_its_cost(folder: Path) -> None:
    """Before the pilot: the grids and the further seed of three methods, two of them at no rate of their own yet."""
    bench = tiny_bench(folder, PILOTED)
    runs = foreseen(bench, {})
    assert {run.id for run in planned(bench, {})} < {run.id for run in runs}
    assert sum(run.stage == GRID for run in runs) == 3 and sum(run.stage == COMPARISON for run in runs) == 5
    done = results_of(planned(bench, {}), lambda run: 0.5)
    for _ in range(5):
        done = results_of(planned(bench, done), lambda run: 0.5)
    assert {run.id for run in foreseen(bench, done)} == set(done), "in the end nothing is foreseen that was not made"
