"""The tables of a measurement, for a terminal and for a Markdown file."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from malora_dist.bench.results import Result, Row, StepRecord
from malora_dist.bench.variants import TOPICS
from malora_dist.plan.communication import ExchangeBytes

HEADERS = (
    "variant",
    "s/step",
    "ratio",
    "quartiles",
    "CPU ratio",
    "held up",
    "MiB sent",
    "uniform",
    "MiB kept",
    "loss diff.",
)
PHASES = tuple(field.name for field in fields(ExchangeBytes))
PHASE_HEADERS = ("variant", *(phase.replace("_", " ") for phase in PHASES), "all")
NOTES = (
    "s/step: median over the steps measured. ratio: to the first variant, median over pairs of the same step; beside "
    "it the quartiles of the pairs. CPU ratio: the same of processor time, to which waiting and other programs add "
    "little.",
    "held up: share of a step in which a process stands still in the exchange of tokens, waiting for a slower process "
    "included. On a GPU it is the host that stands still, for the counts and all kernels before them: it says little.",
    "MiB sent: by one process in a step, in the exchange alone. uniform: what plan.communication gives for the "
    "same tokens if every set of experts were equally likely.",
    "MiB kept: parameters that one process holds between steps. loss diff.: largest difference of a step's loss from "
    "the first variant's, warm-up included.",
)


@dataclass(frozen=True)
class Sheet:
    """A table as text."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def for_terminal(self) -> Table:
        """Return the table for rich's Console.print."""
        table = Table(title=self.title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for index, header in enumerate(self.headers):
            table.add_column(header, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def as_markdown(self) -> str:
        """Render the table in Markdown."""
        lines = [self.headers, tuple("---:" if index else "---" for index in range(len(self.headers))), *self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def sheets(result: Result) -> Iterator[Sheet]:
    """Yield one sheet for each comparison, and one of bytes by phase."""
    for comparison in result.selection.comparisons:
        rows = tuple(_cells(row) for row in result.rows(comparison))
        yield Sheet(f"{comparison.topic}: {TOPICS[comparison.topic]}", HEADERS, rows)
        if comparison.topic == "ep" and len(comparison.variants) > 1:
            rows = tuple(cells for row in result.rows(comparison) if row.sent_bytes for cells in _phases(row))
            yield Sheet("ep: MiB that one process sends in a step, by phase", PHASE_HEADERS, rows)


def _cells(row: Row) -> tuple[str, ...]:
    sent, uniform = sum(row.sent_bytes.values()), sum(row.uniform_bytes.values())
    return (
        row.variant,
        f"{row.step_seconds:.3f}",
        f"{row.ratio:.2f}",
        "-".join(f"{quartile:.2f}" for quartile in row.ratio_quartiles),
        f"{row.cpu_ratio:.2f}",
        f"{row.waiting_share:.1%}" if sent else "",
        _mib(sent) if sent else "",
        _mib(uniform) if sent else "",
        _mib(row.kept_bytes),
        f"{row.loss_difference:.1e}" if row.loss_difference else "0",
    )


def _phases(row: Row) -> Iterator[tuple[str, ...]]:
    for what, sizes in (("sent", row.sent_bytes), ("uniform", row.uniform_bytes)):
        yield f"{row.variant}: {what}", *(_mib(sizes.get(phase, 0)) for phase in PHASES), _mib(sum(sizes.values()))


def markdown(result: Result, command: str) -> str:
    """Render heading, command, facts, tables and what their columns mean."""
    facts = [f"- {name}: {value}" for name, value in result.facts.items()]
    left_out = [f"- left out: {' '.join(sentence.split())}" for sentence in result.selection.left_out]
    title = f"## {result.facts['model']}, {result.world_size} process{'es' if result.world_size > 1 else ''}"
    parts = [title, "", f"    {command}", "", *facts, *left_out, "", *(s.as_markdown() for s in sheets(result))]
    return "\n".join([*parts, "\n\n".join(NOTES)]) + "\n"


def step_line(number: int, steps: int, name: str, record: StepRecord, first: StepRecord, world_size: int) -> str:
    """Format one step of one variant: loss, difference to the first variant's, seconds, and what a process sent."""
    total = sum(record.sent_bytes.values())
    sent = f"  {_mib(total / world_size)} MiB sent" if total else ""
    difference = "" if record is first else f" ({record.loss - first.loss:+.1e})"
    return f"step {number}/{steps}  {name}  loss {record.loss:.6f}{difference}  {record.seconds:.3f} s{sent}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.3g}" if nbytes < 100 * 2**20 else f"{nbytes / 2**20:.0f}"
