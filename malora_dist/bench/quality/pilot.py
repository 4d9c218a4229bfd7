"""Which tasks a suite keeps: those that move when a single-task method learns them alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from malora_dist.bench.quality.results import Result
from malora_dist.bench.quality.runs import Bench, Run
from malora_dist.bench.quality.statistics import Difference, paired_difference

PILOT = "pilot"
DRAWS = 2000


@dataclass(frozen=True)
class Piloted:
    """One task of the pilot: accuracy of the untouched base and after learning it alone, and their difference."""

    task: str
    base: float
    trained: float
    gain: Difference

    def moves(self, highest: float) -> bool:
        """Return whether the task is learned at all, but not above `highest`, where methods cannot be told apart."""
        return self.gain.low > 0 and self.trained <= highest


def pilot_runs(bench: Bench) -> list[Run]:
    """Return the runs of the pilot, one for each task; none without a pilot."""
    suite = bench.suite
    if suite.pilot is None:
        return []
    method = next(method for method in suite.methods if method.single_task and method.rates)
    return bench.runs(method, suite.task_names, method.middle_rate, suite.seeds.grid, PILOT)


def piloted(bench: Bench, results: Mapping[str, Result]) -> Iterator[Piloted]:
    """Yield what the pilot has found so far, in the order of the suite's tasks; failed runs are left out."""
    base = results.get(bench.base_run().id)
    if base is None or not base.finished:
        return
    for run in pilot_runs(bench):
        found = results.get(run.id)
        if found is not None and found.finished:
            (task,) = run.tasks
            gain = paired_difference([{task: found.hits(task)}], [{task: base.hits(task)}], draws=DRAWS)
            yield Piloted(task, base.accuracy[task], found.accuracy[task], gain)


def kept_tasks(bench: Bench, results: Mapping[str, Result]) -> tuple[str, ...] | None:
    """Return the tasks that are learned together, in the suite's order; None before the pilot is done.

    With fewer tasks that move than are to be kept, those that gained most of the others fill up.
    """
    suite = bench.suite
    if suite.pilot is None:
        return suite.task_names
    if any(run.id not in results for run in (bench.base_run(), *pilot_runs(bench))):
        return None
    highest, found = suite.pilot.highest, list(piloted(bench, results))
    others = sorted((one for one in found if not one.moves(highest)), key=lambda one: -one.gain.mean)
    order = [*(one for one in found if one.moves(highest)), *others]
    chosen = {one.task for one in order[: suite.pilot.keep]}
    return tuple(name for name in suite.task_names if name in chosen)
