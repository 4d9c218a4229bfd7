"""What a run costs, from the steps and evaluations that were measured, and what all that is left will."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from malora_dist.bench.quality.results import Result
from malora_dist.bench.quality.runs import BASE, Run


def seconds_of(run: Run, results: Mapping[str, Result]) -> float | None:
    """Return the seconds of processors that a run will take: as many as those of its method, else of its suite.

    None if nothing like it was measured. Unlike seconds of the clock they hardly depend on what else a machine does.
    """
    mine = [result for result in results.values() if result.record["suite"] == run.suite and result.finished]
    alike = [r for r in mine if (r.record["method"], bool(r.record["task"])) == (run.method, bool(run.task))]
    others = [r for r in mine if r.record["method"] != BASE and bool(r.record["task"]) == bool(run.task)]
    for known in (alike, others):
        if known:
            return float(median(result.record["seconds"]["cpu"] for result in known))
    return next((_from_base(run, result) for result in mine if result.record["method"] == BASE), None)


def _from_base(run: Run, base: Result) -> float:
    """Return the seconds of a run by those of the base's, which has a few steps and scores all tasks."""
    record, train = base.record, run.recipe["train"]
    samples = train["global_batch_size"] / record["recipe"]["train"]["global_batch_size"]
    busy = record["seconds"]["cpu"] / record["seconds"]["wall"]
    step, steps = record["step_seconds"] * busy, record["recipe"]["train"]["max_steps"]
    scored = max(0.0, record["seconds"]["cpu"] - step * steps) * len(run.tasks) / len(record["rows"])
    return float(step * samples * train["max_steps"] + scored)


def cost_lines(runs: Sequence[Run], results: Mapping[str, Result], jobs: int = 1) -> Iterator[str]:
    """Return a line for each suite, and one for all, on the runs that are done and what those that are left will cost.

    Args:
        runs: all that are known of.
        results: those that are there.
        jobs: runs at the same time.
    """
    total, complete = 0.0, True
    for suite in dict.fromkeys(run.suite for run in runs):
        left = [run for run in runs if run.suite == suite and run.id not in results]
        done = sum(run.suite == suite and run.id in results for run in runs)
        seconds = [seconds_of(run, results) for run in left]
        known = [value for value in seconds if value is not None]
        complete &= len(known) == len(left)
        total += sum(known)
        cost = f"{median(known):.0f} s each, {sum(known) / 3600:.1f} h" if known else "not measured yet"
        yield f"{suite}: {done} runs done, {len(left)} left: {cost}"
    rest = "" if complete else ", and what is not measured yet"
    hours = total / 3600
    yield f"in all {hours:.1f} h of processors, {hours / jobs:.1f} h with {jobs} at a time, without extensions{rest}"
