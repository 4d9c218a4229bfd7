"""The results as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from malora_dist.report.results import Results, Score, TaskResult, headline, improvements, percent, read_results


def print_results(evaluations: Mapping[str, Any]) -> Table:
    """Print zero-shot, majority and tuned accuracy of each task in per cent, with counts and standard errors.

    `evaluations` is the content of eval.json. The table is printed with a rich Console.
    """
    results = read_results(evaluations)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")
    table.title = "Accuracy in %, ± standard error"
    table.caption = _caption(results)
    table.add_column("task", no_wrap=True)
    for column in ("n", "majority", "zero-shot", "tuned", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for result in results.tasks:
        table.add_row(*_row(result))
    average = results.average
    if average is not None and len(results.compared) > 1:
        table.add_section()
        table.add_row(*_row(average)[:-1], "", style="bold")
    return table


def _caption(results: Results) -> Text:
    return Text(" ".join(filter(None, [headline(results) and f"{headline(results)}.", improvements(results)])))


def _row(result: TaskResult) -> list[Text]:
    style = "green" if result.improved else "red" if result.worse else ""
    cells = [
        result.task,
        f"{result.n}",
        percent(result.majority),
        _measured(result.base),
        _measured(result.tuned),
        _difference(result),
    ]
    return [*(Text(cell) for cell in cells), Text(result.verdict, style=style)]


def _measured(score: Score | None) -> str:
    if score is None:
        return "–"
    if score.accuracy is None:
        return "–" if score.loss is None else f"loss {score.loss:.3f}"
    return _with_error(percent(score.accuracy), score.stderr)


def _difference(result: TaskResult) -> str:
    if result.difference is not None:
        return _with_error(percent(result.difference, sign=True), result.difference_stderr)
    base, tuned = result.base, result.tuned
    if base is None or tuned is None or base.loss is None or tuned.loss is None:
        return "–"
    return f"{tuned.loss - base.loss:+.3f}".replace("-", "−")


def _with_error(value: str, stderr: float) -> str:
    return f"{value} ± {percent(stderr):>4}"
