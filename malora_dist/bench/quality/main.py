"""`malora bench quality`: the queue of some suites, its list of runs, and its tables."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from malora_dist.bench.local.output import TABLE_WIDTH, log
from malora_dist.bench.quality.cost import cost_lines, seconds_of
from malora_dist.bench.quality.queue import Queue, lowest_priority
from malora_dist.bench.quality.results import read_results
from malora_dist.bench.quality.runs import Bench
from malora_dist.bench.quality.suite import Split, load_suite
from malora_dist.bench.quality.tables import NOTES, markdown, sheets
from malora_dist.errors import ConfigError
from malora_dist.files.atomic import write_text


@dataclass(frozen=True)
class QualityOptions:
    """Options of the command."""

    suites: tuple[Path, ...]
    out: Path
    only: str = "*"
    final: bool = False
    jobs: int = 1
    limit: int | None = None
    markdown: Path | None = None

    @property
    def split(self) -> Split:
        """The rows that tables are of."""
        return "test" if self.final else "validation"


def queue(options: QualityOptions) -> None:
    """Run what is left. Raises ConfigError or DataError, before the first run, for what is wrong."""
    lowest_priority()
    if isinstance(sys.stdout, object) and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    _queue(options).run()


def listing(options: QualityOptions) -> None:
    """Print every run that is known to be needed: whether it is done, why it is made and what it costs."""
    work, results = _queue(options), read_results(options.out)
    runs = work.known(results)
    for run in runs:
        seconds = seconds_of(run, results)
        state = "done" if run.id in results else "left" if seconds is None else f"left, {seconds:.0f} s"
        print(f"{run.stage:<11} {run.id}  {state}")
    for line in cost_lines(work.foreseen(results), results, options.jobs):
        print(line)


def tables(options: QualityOptions) -> None:
    """Print the tables of the results so far, and write them to a file."""
    benches, results = _benches(options), read_results(options.out)
    if options.markdown is not None:
        write_text(options.markdown, markdown(benches, results, options.split))
    console = Console()
    wide = Console(width=max(console.width, TABLE_WIDTH))
    for bench in benches:
        for sheet in sheets(bench, results, options.split):
            wide.print(sheet.for_terminal())
    console.print("\n".join(NOTES), markup=False, highlight=False, soft_wrap=True)


def _queue(options: QualityOptions) -> Queue:
    return Queue(
        _benches(options), options.out, only=options.only, final=options.final, limit=options.limit, jobs=options.jobs
    )


def _benches(options: QualityOptions) -> list[Bench]:
    suites = [load_suite(path) for path in options.suites]
    if len({suite.name for suite in suites}) < len(suites):
        raise ConfigError(f"suites {', '.join(map(str, options.suites))}: `name` must be different in each")
    return [Bench.open(suite, options.out, with_test=options.final, say=log) for suite in suites]
