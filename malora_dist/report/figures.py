"""The report's charts, each a function from a run's files to SVG; None where the run has not the numbers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from malora_dist.report.charts import Line, line_chart, picture, place_axes, to_svg
from malora_dist.report.inputs import RunFiles
from malora_dist.report.results import BEYOND, Results, Score, TaskResult, percent
from malora_dist.report.theme import ACCENT, GRID, INK, MUTED, SURFACE, task_colour
from malora_dist.tracking.metrics import AUX_LOSS, EVAL, LOSS, eval_accuracy, train_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCURACY_WIDTH = 330
_ROW = 38
_LETTER = 6.4  # SVG units a letter of a row's name takes


def accuracy_chart(results: Results, tasks: Sequence[str]) -> str | None:
    """Draw a row for each task: hollow zero-shot, filled tuned, bars of 2 standard errors, majority as a tick."""
    rows = [result for result in results.tasks if _has_accuracy(result.base) or _has_accuracy(result.tuned)]
    if not rows:
        return None
    with picture(_ACCURACY_WIDTH, 28 + _ROW * len(rows)) as figure:
        axes = place_axes(figure, left=name_margin([row.task for row in rows]), right=14, top=4, bottom=24)
        for y, result in enumerate(rows):
            _accuracy_row(axes, y, result, task_colour(tasks.index(result.task)))
        axes.set_yticks(range(len(rows)), [shorten(row.task) for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        low, high = axes.get_xlim()
        axes.set_xlim(max(-2.0, low), min(102.0, high))
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} %")
        return to_svg(figure, "accuracy", _accuracy_label(rows))


def _accuracy_row(axes: "Axes", y: int, result: TaskResult, colour: str) -> None:
    base, tuned = result.base, result.tuned
    for score, offset, line, fill in ((base, -0.13, MUTED, SURFACE), (tuned, 0.13, colour, colour)):
        if score is None or score.accuracy is None:
            continue
        axes.errorbar(
            100 * score.accuracy,
            y + offset,
            xerr=100 * BEYOND * score.stderr,
            fmt="o",
            color=line,
            markerfacecolor=fill,
            markeredgecolor=line,
            markersize=6.5,
            markeredgewidth=1.5,
            elinewidth=1.6,
        )
    if result.majority is not None:
        axes.errorbar(100 * result.majority, y, yerr=0.32, fmt="none", color=INK, elinewidth=1.4)


def _accuracy_label(rows: Sequence[TaskResult]) -> str:
    parts = [
        f"{row.task} from {percent(row.base.accuracy)} to {percent(row.tuned.accuracy)}"
        for row in rows
        if row.base is not None and row.tuned is not None
    ]
    return "Accuracy in per cent, zero-shot and tuned: " + ", ".join(parts)


def _has_accuracy(score: Score | None) -> bool:
    return score is not None and score.accuracy is not None


def loss_chart(run: RunFiles) -> str | None:
    """Draw the loss of the whole mixture, raw and smoothed, and each task's, smoothed."""
    steps, values = run.series(LOSS)
    if not steps:
        return None
    tasks = [line for _, line in _task_lines(run, train_loss, smooth=True)]
    whole = Line(steps, values, INK, smooth=True, raw=True)
    return line_chart("loss", [*tasks, whole], label="Training loss over steps, of the mixture and of each task")


def task_loss_charts(run: RunFiles) -> dict[str, str]:
    """Draw a small chart for each task that has losses: raw and smoothed."""
    charts = {}
    for index, (task, line) in enumerate(_task_lines(run, train_loss, smooth=True, raw=True)):
        label = f"Training loss of {task}, from {line.values[0]:.3f} to {line.values[-1]:.3f}"
        charts[task] = line_chart(f"task-loss-{index}", [line], label=label, small=True)
    return charts


def validation_chart(run: RunFiles) -> str | None:
    """Draw the accuracy of each task on the validation split while training."""
    lines = [line for _, line in _task_lines(run, eval_accuracy, kind=EVAL)]
    if not lines:
        return None
    return line_chart("validation", lines, label="Validation accuracy of each task over steps", as_percent=True)


def metric_chart(run: RunFiles, metric: str, *, label: str, from_zero: bool = True) -> str | None:
    """Draw one metric of the log records over steps."""
    steps, values = run.series(metric)
    if not steps:
        return None
    return line_chart(metric.replace("_", "-"), [Line(steps, values, ACCENT)], label=label, from_zero=from_zero)


def balance_chart(run: RunFiles, reference: float | None) -> str | None:
    """Draw the balance loss over steps; `reference` is its value when all experts get the same share."""
    steps, values = run.series(AUX_LOSS)
    if not steps or not any(values):
        return None
    line = Line(steps, values, ACCENT)
    return line_chart("balance", [line], label="Balance loss over steps", reference=reference)


def _task_lines(
    run: RunFiles, metric: Callable[[str], str], *, kind: str = "train", smooth: bool = False, raw: bool = False
) -> list[tuple[str, Line]]:
    found = []
    for index, task in enumerate(run.tasks):
        steps, values = run.series(metric(task), kind)
        if steps:
            found.append((task, Line(steps, values, task_colour(index), index >= 10, smooth, raw)))
    return found


def shorten(name: str, letters: int = 16) -> str:
    """Return the name, or its beginning with an ellipsis."""
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def name_margin(names: Sequence[str]) -> float:
    """Return the room for the longest of the names beside a chart, in SVG units."""
    return 14 + _LETTER * max(len(shorten(name)) for name in names)
