"""The tables of suites, from the results that are there so far."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

import numpy as np

from malora_dist.bench.quality.pilot import kept_tasks, piloted
from malora_dist.bench.quality.results import Result
from malora_dist.bench.quality.runs import Bench, Run
from malora_dist.bench.quality.schedule import COMPARISON, FINAL, RateGrid, rate_grids
from malora_dist.bench.quality.statistics import Array, Difference, paired_difference
from malora_dist.bench.quality.suite import Method, Split
from malora_dist.bench.table import Sheet

Results = Mapping[str, Result]
# By method and seed, the results at its best rate: one, or for a single-task method one a task.
Chosen = Mapping[str, dict[int, list[Result]]]
NOTES = (
    "Accuracy in percent: the choice with the largest summed log-likelihood. Rates: each method's best on validation "
    "with a seed of its own. Difference: paired over seeds and questions, with its interval of 95 % by bootstrap; "
    "seen from: the smallest true difference that this many seeds and questions show in 80 % of cases. With few seeds "
    "intervals are too narrow.",
    "log-loss: minus the log-probability of the right choice among the choices, in nats; less is better.",
)


def sheets(bench: Bench, results: Results, split: Split = "validation") -> Iterator[Sheet]:
    """Return a suite's tables: pilot, learning rates, comparison, seesaw, and runs that failed."""
    mine = {key: result for key, result in results.items() if result.record["suite"] == bench.suite.name}
    tasks = kept_tasks(bench, mine)
    tables = [_pilot(bench, tasks, mine)]
    if tasks:
        grids = rate_grids(bench, tasks, mine)
        chosen = {method.name: _at_best(bench, method, tasks, grids, mine, split) for method in bench.suite.methods}
        tables += [_rates(bench, grids), _comparison(bench, tasks, grids, chosen, split), _seesaw(bench, tasks, chosen)]
    yield from (sheet for sheet in (*tables, _failures(bench, mine)) if sheet.rows)


def markdown(benches: Sequence[Bench], results: Results, split: Split = "validation") -> str:
    """Return the tables of all suites as Markdown, with what their columns mean."""
    parts = []
    for bench in benches:
        parts += [f"## {bench.suite.name}: {bench.suite.about}", ""]
        parts += [sheet.as_markdown() for sheet in sheets(bench, results, split)]
    return "\n".join([*parts, "\n\n".join(NOTES)]) + "\n"


def _pilot(bench: Bench, kept: tuple[str, ...] | None, results: Results) -> Sheet:
    """Return the table of each task alone under a single-task method: what moves and is kept, and what is dropped."""
    suite, rows = bench.suite, []
    for one in piloted(bench, results):
        task = bench.tasks[one.task]
        sizes = (str(task.sizes["train"]), str(task.sizes["validation"]), str(task.sizes["test"]))
        fate = "" if kept is None else "kept" if one.task in kept else "dropped"
        scores = (_percent(one.base), _percent(one.trained))
        rows.append((one.task, task.domain, *sizes, *scores, *_cells(one.gain), fate))
    headers = ("task", "about", "train", "validation", "test", "zero-shot", "alone", "gain", "95 %", "")
    return Sheet(f"Pilot of {suite.name}: each task learned alone, accuracy on validation", headers, tuple(rows))


def _rates(bench: Bench, grids: Mapping[str, RateGrid]) -> Sheet:
    rates = sorted({rate for grid in grids.values() for rate in grid.scores})
    rows = []
    for method in bench.suite.methods:
        grid = grids.get(method.name)
        if grid is not None and grid.scores:
            cells = [_score(grid, rate) for rate in rates]
            rows.append((method.name, f"{bench.parameters[method.name]:,}", *cells, "" if grid.best else "not settled"))
    headers = ("method", "parameters", *(f"{rate:g}" for rate in rates), "")
    return Sheet(f"Learning rates of {bench.suite.name}: mean accuracy, validation, one seed", headers, tuple(rows))


def _score(grid: RateGrid, rate: float) -> str:
    if rate not in grid.scores:
        return ""
    text = "failed" if grid.scores[rate] == float("-inf") else _percent(grid.scores[rate])
    return f"**{text}**" if rate == grid.best else text


def _at_best(
    bench: Bench,
    method: Method,
    tasks: tuple[str, ...],
    grids: Mapping[str, RateGrid],
    results: Results,
    split: Split,
) -> dict[int, list[Result]]:
    """Return a method's results at its best rate by seed, those of all tasks for a single-task method."""
    best, seeds = grids[method.rates_of or method.name].best, bench.suite.seeds
    if best is None:
        return {}
    stage, wanted = (FINAL, seeds.final) if split == "test" else (COMPARISON, (seeds.grid, *seeds.compare))
    found = {}
    for seed in wanted:
        runs: list[Run] = bench.runs(method, tasks, best, seed, stage, split)
        if all(run.id in results and results[run.id].finished for run in runs):
            found[seed] = [results[run.id] for run in runs]
    return found


def _comparison(
    bench: Bench,
    tasks: tuple[str, ...],
    grids: Mapping[str, RateGrid],
    chosen: Chosen,
    split: Split,
) -> Sheet:
    suite, rows = bench.suite, []
    for method in suite.methods:
        by_seed = chosen[method.name]
        if by_seed:
            accuracy = {task: mean(_accuracy(one, task) for one in by_seed.values()) for task in tasks}
            losses = [_scores(one, losses=True)[task].mean() for one in by_seed.values() for task in tasks]
            cells = [f"{grids[method.rates_of or method.name].best:g}", str(len(by_seed))]
            cells += [_percent(accuracy[task]) for task in tasks]
            cells += [_percent(mean(accuracy.values())), f"{np.mean(losses):.3f}"]
            for other in suite.against:
                cells += _against(method.name, other, chosen)
            rows.append((method.name, f"{bench.parameters[method.name]:,}", *cells))
    headers = ["method", "parameters", "rate", "seeds", *tasks, "mean", "log-loss"]
    for other in suite.against:
        headers += [f"minus {other}", "95 %", "seen from"]
    return Sheet(f"Methods of {suite.name}, {split}", tuple(headers), tuple(rows))


def _against(name: str, other: str, chosen: Chosen) -> list[str]:
    seeds = [seed for seed in chosen[name] if seed in chosen[other]]
    if name == other or not seeds:
        return ["", "", ""]
    both = [[_scores(chosen[which][seed]) for seed in seeds] for which in (name, other)]
    difference = paired_difference(*both)
    return [*_cells(difference), f"{100 * difference.smallest_seen:.1f}"]


def _seesaw(bench: Bench, tasks: tuple[str, ...], chosen: Chosen) -> Sheet:
    """Return the table of each task's accuracy minus that of its single-task adapter, over the seeds that both have."""
    suite, rows = bench.suite, []
    alone = next((method for method in suite.methods if method.single_task), None)
    for method in suite.methods:
        seeds = [] if alone is None else [seed for seed in chosen[method.name] if seed in chosen[alone.name]]
        if method is alone or alone is None or not seeds:
            continue
        gains = [
            mean(
                _accuracy(chosen[method.name][seed], task) - _accuracy(chosen[alone.name][seed], task) for seed in seeds
            )
            for task in tasks
        ]
        worse = sum(gain < 0 for gain in gains)
        rows.append(
            (method.name, str(len(seeds)), *(f"{100 * gain:+.1f}" for gain in gains), f"{worse} of {len(tasks)}")
        )
    title = f"Seesaw of {suite.name}: points gained on each task against {alone.name if alone else 'it'} alone"
    return Sheet(title, ("method", "seeds", *tasks, "lose"), tuple(rows))


def _failures(bench: Bench, results: Results) -> Sheet:
    rows = tuple((key, result.record["error"]) for key, result in results.items() if not result.finished)
    return Sheet(f"Runs of {bench.suite.name} that failed", ("run", "error"), rows)


def _scores(results: Sequence[Result], *, losses: bool = False) -> dict[str, Array]:
    """Return by task the (N,) hits, or losses, of a method's results with one seed."""
    scores = {}
    for result in results:
        for task in result.accuracy:
            scores[task] = result.choice_losses(task) if losses else result.hits(task)
    return scores


def _accuracy(results: Sequence[Result], task: str) -> float:
    return next(result.accuracy[task] for result in results if task in result.accuracy)


def _cells(difference: Difference) -> tuple[str, str]:
    return f"{100 * difference.mean:+.1f}", f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
