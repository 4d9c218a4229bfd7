"""The report's tables and lists of facts, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape

from malora_dist.report.results import Results, Score, TaskResult, percent
from malora_dist.report.theme import task_variable

_COUNTS_FIRST = ("train", "validation", "test", "samples_per_epoch", "rows_read")


def results_table(results: Results, tasks: Sequence[str]) -> str:
    """A row for each task with accuracies, and the mean below them; empty if no accuracy was measured."""
    rows = [row for row in results.tasks if _accuracy(row.base) is not None or _accuracy(row.tuned) is not None]
    if not rows:
        return ""
    body = "".join(_result_row(row, _task_name(row.task, tasks) + _verdict(row)) for row in rows)
    average = results.average
    foot = ""
    if average is not None and len(results.compared) > 1:
        foot = f"<tfoot>{_result_row(average, 'average')}</tfoot>"
    head = _head("task", "n", "majority", "zero-shot", "tuned", "change")
    return f'<div class="scroll"><table class="results">{head}<tbody>{body}</tbody>{foot}</table></div>'


def loss_table(results: Results, tasks: Sequence[str]) -> str:
    """Held-out loss per token before and after, and accuracy per character; empty if no loss was measured."""
    rows = [row for row in results.tasks if _loss(row.base) != "–" or _loss(row.tuned) != "–"]
    if not rows:
        return ""
    body = "".join(
        f"<tr><th>{_task_name(row.task, tasks)}</th><td>{row.n}</td>"
        f"<td>{_loss(row.base)}</td><td>{_loss(row.tuned)}</td><td>{_norm(row.base)}</td><td>{_norm(row.tuned)}</td></tr>"
        for row in rows
    )
    head = _head("task", "n", "loss, zero-shot", "loss, tuned", "per character, zero-shot", "per character, tuned")
    return f'<div class="scroll"><table class="counts">{head}<tbody>{body}</tbody></table></div>'


def counts_table(counts: Mapping[str, Mapping[str, int]], tasks: Sequence[str]) -> str:
    """data.json: rows by task and what became of them; columns that are 0 everywhere are left out."""
    names = dict.fromkeys([*_COUNTS_FIRST, *(name for row in counts.values() for name in row)])
    shown = [name for name in names if any(row.get(name) for row in counts.values())]
    body = "".join(
        f"<tr><th>{_task_name(task, tasks)}</th>"
        + "".join(f"<td>{row[name]:,}</td>" if name in row else "<td>–</td>" for name in shown)
        + "</tr>"
        for task, row in counts.items()
    )
    head = _head("task", *(name.replace("_", " ") for name in shown))
    return f'<div class="scroll"><table class="counts">{head}<tbody>{body}</tbody></table></div>'


def fact_list(facts: Mapping[str, str], css_class: str) -> str:
    """Names and values as a definition list. Values are HTML."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<dl class="{css_class}">{items}</dl>'


def task_legend(tasks: Sequence[str], order: Sequence[str]) -> str:
    """Tasks with their colours; `order` is that of the run."""
    items = "".join(f"<li>{_task_name(task, order)}</li>" for task in tasks)
    return f'<ul class="legend">{items}</ul>'


def _task_name(task: str, tasks: Sequence[str]) -> str:
    colour = task_variable(tasks.index(task))
    return f'<span class="task" style="--c: {colour}">{escape(task)}</span>'


def _head(*columns: str) -> str:
    return "<thead><tr>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr></thead>"


def _result_row(row: TaskResult, name: str) -> str:
    difference = percent(row.difference, sign=True)
    cells = [
        f"{row.n:,}",
        percent(row.majority),
        _with_error(percent(_accuracy(row.base)), row.base.stderr if row.base else None),
        _with_error(percent(_accuracy(row.tuned)), row.tuned.stderr if row.tuned else None),
        _with_error(difference, None if row.difference is None else row.difference_stderr),
    ]
    return f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _verdict(row: TaskResult) -> str:
    css_class = "verdict good" if row.improved else "verdict bad" if row.worse else "verdict"
    return f'<span class="{css_class}">{escape(row.verdict)}</span>'


def _with_error(value: str, stderr: float | None) -> str:
    error = "" if stderr is None else f"± {percent(stderr)}"
    return f'{value}<span class="err">{error}</span>'


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.accuracy


def _loss(score: Score | None) -> str:
    return "–" if score is None or score.loss is None else f"{score.loss:.3f}"


def _norm(score: Score | None) -> str:
    return percent(None if score is None else score.accuracy_norm)
