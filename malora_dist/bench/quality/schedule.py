"""Which runs a suite still needs, in the order of what they tell: from its results alone, so that it may be stopped."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mean

from malora_dist.bench.quality.pilot import PILOT, kept_tasks, pilot_runs
from malora_dist.bench.quality.results import Result
from malora_dist.bench.quality.runs import BASE, Bench, Run
from malora_dist.bench.quality.suite import Method, Split

MIDDLE, GRID, EXTENSION, COMPARISON, FINAL = "middle", "grid", "extension", "comparison", "final"
STAGES = (BASE, PILOT, MIDDLE, GRID, EXTENSION, COMPARISON, FINAL)


@dataclass(frozen=True)
class RateGrid:
    """What is known of a method's learning rates.

    scores: mean accuracy on validation by rate, of those whose runs are all done. wanted: rates still to be run.
    """

    scores: dict[float, float] = field(default_factory=dict)
    wanted: tuple[float, ...] = ()

    @property
    def best(self) -> float | None:
        """The best rate, of equal ones the smallest, once nothing is wanted any more; None before, or if all failed."""
        if self.wanted or not self.scores or max(self.scores.values()) == float("-inf"):
            return None
        return max(sorted(self.scores), key=lambda rate: self.scores[rate])


def planned(bench: Bench, results: Mapping[str, Result], *, final: bool = False) -> list[Run]:
    """Return all runs of a suite that are known to be needed, done or not, the most telling first.

    Learning rates beyond an edge, and runs at the best rate, are known only when the grid's results are there.

    Args:
        bench: the suite, prepared.
        results: those that are there.
        final: the final runs too, which are measured on test, at the rates that are best on validation.
    """
    runs: dict[str, Run] = {}
    for run in sorted(_all(bench, results, final), key=lambda run: STAGES.index(run.stage)):
        runs.setdefault(run.id, run)
    return list(runs.values())


def foreseen(bench: Bench, results: Mapping[str, Result]) -> list[Run]:
    """Return `planned` and what will follow, for its cost: before the pilot is done, with the first tasks as kept.

    Before a method's best rate is known, its further seeds are foreseen at the middle one; extensions are not.
    """
    suite, kept = bench.suite, kept_tasks(bench, results)
    tasks = kept or suite.task_names[: suite.num_tasks]
    grids = rate_grids(bench, tasks, results) if kept else {}
    runs = {run.id: run for run in planned(bench, results)}
    for method in suite.methods:
        owner = suite.method(method.rates_of or method.name)
        if grids.get(owner.name, RateGrid()).best is not None:
            continue
        more = [bench.runs(method, tasks, rate, suite.seeds.grid, GRID) for rate in method.rates if not kept]
        seeds = suite.seeds.compare if method.rates else (suite.seeds.grid, *suite.seeds.compare)
        more += [bench.runs(method, tasks, owner.middle_rate, seed, COMPARISON) for seed in seeds]
        for run in (run for some in more for run in some):
            runs.setdefault(run.id, run)
    return list(runs.values())


def _all(bench: Bench, results: Mapping[str, Result], final: bool) -> Iterator[Run]:
    suite, seed = bench.suite, bench.suite.seeds.grid
    yield bench.base_run()
    yield from pilot_runs(bench)
    tasks = kept_tasks(bench, results)
    if not tasks:
        return
    for method in suite.methods:
        if method.rates:
            yield from bench.runs(method, tasks, method.middle_rate, seed, MIDDLE)
    for rates in _rounds(suite.methods):
        for method, rate in rates:
            yield from bench.runs(method, tasks, rate, seed, GRID)
    grids = rate_grids(bench, tasks, results)
    for name, grid in grids.items():
        method = suite.method(name)
        for rate in (*grid.scores, *grid.wanted):
            if rate not in method.rates:
                yield from bench.runs(method, tasks, rate, seed, EXTENSION)
    yield from _at_best_rates(bench, tasks, grids, final)


def _rounds(methods: Iterable[Method]) -> list[list[tuple[Method, float]]]:
    """Return the rates beside the middle one, one of each method at a time: the nearest first, above before below."""
    by_method = []
    for method in methods:
        middle = len(method.rates) // 2
        others = sorted(range(len(method.rates)), key=lambda n: (abs(n - middle), n < middle))
        by_method.append([(method, method.rates[n]) for n in others if n != middle])
    longest = max(map(len, by_method), default=0)
    return [[rates[n] for rates in by_method if n < len(rates)] for n in range(longest)]


def _at_best_rates(bench: Bench, tasks: tuple[str, ...], grids: Mapping[str, RateGrid], final: bool) -> Iterator[Run]:
    seeds = bench.suite.seeds
    parts: list[tuple[str, Split, tuple[int, ...]]] = [(COMPARISON, "validation", (seeds.grid, *seeds.compare))]
    if final:
        parts.append((FINAL, "test", seeds.final))
    for stage, split, of_stage in parts:
        for seed in of_stage:
            for method in bench.suite.methods:
                best = grids[method.rates_of or method.name].best
                if best is not None:
                    yield from bench.runs(method, tasks, best, seed, stage, split)


def rate_grids(bench: Bench, tasks: tuple[str, ...], results: Mapping[str, Result]) -> dict[str, RateGrid]:
    """Return `rate_grid` of every method that has rates of its own."""
    return {method.name: rate_grid(bench, method, tasks, results) for method in bench.suite.methods if method.rates}


def rate_grid(bench: Bench, method: Method, tasks: tuple[str, ...], results: Mapping[str, Result]) -> RateGrid:
    """Return a method's learning rates with their scores, and those that are to be run next.

    Beyond the given rates one is added at a time, while the best is at an edge and `grid.extensions` are not used up.
    """
    suite = bench.suite
    scores: dict[float, float] = {}
    rates = list(method.rates)
    while True:
        wanted = tuple(rate for rate in rates if rate not in scores)
        for rate in wanted:
            runs = bench.runs(method, tasks, rate, suite.seeds.grid, GRID)
            if all(run.id in results for run in runs):
                scores[rate] = mean(results[run.id].average for run in runs)
        wanted = tuple(rate for rate in rates if rate not in scores)
        edge = None if wanted else next_rate(scores, suite.grid.factor)
        if edge is None or len(rates) - len(method.rates) >= suite.grid.extensions:
            return RateGrid(scores, wanted)
        rates.append(edge)


def next_rate(scores: Mapping[float, float], factor: float) -> float | None:
    """Return the rate beyond the edge that the best one is at; None if it is inside, or if no run succeeded."""
    if max(scores.values()) == float("-inf"):
        return None
    best = max(sorted(scores), key=lambda rate: scores[rate])
    if best == max(scores):
        return _rounded(best * factor)
    return _rounded(best / factor) if best == min(scores) else None


def _rounded(rate: float) -> float:
    """Return the rate with six digits, so that a factor up and down again gives the same one."""
    return float(f"{rate:.6g}")
