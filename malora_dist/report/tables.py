"""The report's tables as values: columns, and a row for each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from malora_dist.report.results import Results, Score, TaskResult, percent

_COUNTS_FIRST = ("train", "validation", "test", "samples_per_epoch", "rows_read")


@dataclass(frozen=True)
class Measured:
    """A number with its error, which may be empty."""

    value: str
    error: str


@dataclass(frozen=True)
class Row:
    """A row about a task; `verdict` is said below its name."""

    name: str
    cells: Sequence[str | Measured]
    verdict: str | None = None
    verdict_class: str = "verdict"


@dataclass(frozen=True)
class Table:
    """Columns and rows; `foot` is a row below them that is of no task."""

    columns: Sequence[str]
    rows: Sequence[Row]
    foot: Row | None = None


def results_table(results: Results) -> Table | None:
    """Return a row for each task with accuracies, and the mean below them; None if no accuracy was measured."""
    rows = [row for row in results.tasks if _accuracy(row.base) is not None or _accuracy(row.tuned) is not None]
    if not rows:
        return None
    average = results.average
    foot = Row("average", _result_cells(average)) if average is not None and len(results.compared) > 1 else None
    made = [Row(row.task, _result_cells(row), row.verdict, _verdict_class(row)) for row in rows]
    return Table(("task", "n", "majority", "zero-shot", "tuned", "change"), made, foot)


def loss_table(results: Results) -> Table | None:
    """Return held-out loss per token before and after, and accuracy per character; None if no loss was measured."""
    rows = [row for row in results.tasks if _loss(row.base) != "–" or _loss(row.tuned) != "–"]
    if not rows:
        return None
    made = [
        Row(row.task, (f"{row.n}", _loss(row.base), _loss(row.tuned), _norm(row.base), _norm(row.tuned)))
        for row in rows
    ]
    sides = ("loss, zero-shot", "loss, tuned", "per character, zero-shot", "per character, tuned")
    return Table(("task", "n", *sides), made)


def counts_table(counts: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Return data.json as a table: rows by task and what became of them, without columns that are 0 everywhere."""
    names = dict.fromkeys([*_COUNTS_FIRST, *(name for row in counts.values() for name in row)])
    shown = [name for name in names if any(row.get(name) for row in counts.values())]
    rows = [Row(task, [_count(row[name]) if name in row else "–" for name in shown]) for task, row in counts.items()]
    return Table(("task", *(name.replace("_", " ") for name in shown)), rows) if rows else None


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _result_cells(row: TaskResult) -> list[str | Measured]:
    difference = percent(row.difference, sign=True)
    return [
        f"{row.n:,}",
        percent(row.majority),
        _with_error(percent(_accuracy(row.base)), row.base.stderr if row.base else None),
        _with_error(percent(_accuracy(row.tuned)), row.tuned.stderr if row.tuned else None),
        _with_error(difference, None if row.difference is None else row.difference_stderr),
    ]


def _verdict_class(row: TaskResult) -> str:
    return "verdict good" if row.improved else "verdict bad" if row.worse else "verdict"


def _with_error(value: str, stderr: float | None) -> Measured:
    return Measured(value, "" if stderr is None else f"± {percent(stderr)}")


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.accuracy


def _loss(score: Score | None) -> str:
    return "–" if score is None or score.loss is None else f"{score.loss:.3f}"


def _norm(score: Score | None) -> str:
    return percent(None if score is None else score.accuracy_norm)
