"""Line charts as inline SVG. matplotlib is imported when a picture is drawn, through its object API alone."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from malora_dist.report.theme import GRID, INK, MUTED, use_variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 440, 210  # SVG units, 1 unit = 1 point; the page scales them
SMALL_WIDTH, SMALL_HEIGHT = 190, 110
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "malora_dist",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.linewidth": 0.8,
}


@dataclass(frozen=True)
class Line:
    """One line: steps and values, in a stand-in colour of `theme`."""

    steps: Sequence[float]
    values: Sequence[float]
    colour: str = INK
    dashed: bool = False
    smooth: bool = False
    raw: bool = False


def smoothed(values: Sequence[float]) -> list[float]:
    """Average each value and its neighbours, whose weight halves every n / 20 records (at least every record)."""
    keep = 0.5 ** (1 / max(1.0, len(values) / 20))
    before, after = _decayed(values, keep), _decayed(values[::-1], keep)[::-1]
    weights_before, weights_after = _decayed([1.0] * len(values), keep), _decayed([1.0] * len(values), keep)[::-1]
    columns = zip(values, before, after, weights_before, weights_after, strict=True)
    return [(left + right - value) / (w_left + w_right - 1) for value, left, right, w_left, w_right in columns]


def _decayed(values: Sequence[float], keep: float) -> list[float]:
    sums, total = [], 0.0
    for value in values:
        total = keep * total + value
        sums.append(total)
    return sums


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    label: str,
    small: bool = False,
    from_zero: bool = False,
    reference: float | None = None,
    as_percent: bool = False,
    x_label: str = "step",
) -> str:
    """Draw lines over steps, as an <svg> element.

    `reference` draws a dashed level; `label` describes in words what is seen, for screen readers.
    """
    width, height = (SMALL_WIDTH, SMALL_HEIGHT) if small else (WIDTH, HEIGHT)
    with picture(width, height) as figure:
        axes = place_axes(figure, left=34 if small else 48, right=8, top=6, bottom=24)
        for line in lines:
            _draw(axes, line, thin=small)
        if reference is not None:
            axes.axhline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if from_zero:
            axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
        _style(axes, ticks=3 if small else 5)
        axes.yaxis.set_major_formatter((lambda y, _: f"{100 * y:.4g} %") if as_percent else (lambda y, _: number(y)))
        if not small:
            label_ticks(axes, x_label)
        return to_svg(figure, name, label)


def number(value: float) -> str:
    """Format a number shortly for an axis: 12k, 0.002, 5e-05."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{round(value, 12):g}"


@contextmanager
def picture(width: float, height: float) -> Iterator["Figure"]:
    """Yield an empty figure of a size in SVG units, drawn with this module's settings."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        yield Figure(figsize=(width / 72, height / 72))


def place_axes(figure: "Figure", *, left: float, right: float, top: float, bottom: float) -> "Axes":
    """Add axes with margins in SVG units, so that charts below one another line up."""
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    axes.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=10.5, pad=4)
    axes.tick_params(axis="x", pad=8)
    return axes


def label_ticks(axes: "Axes", label: str) -> None:
    """Write the name of the x axis at the left end of its row of tick labels, where nothing can be in the way."""
    axes.annotate(
        label,
        (0, 0),
        xycoords="axes fraction",
        xytext=(-8, -8),
        textcoords="offset points",
        ha="right",
        va="top",
        color=MUTED,
        fontsize=10.5,
        fontstyle="italic",
    )


def to_svg(figure: "Figure", name: str, label: str) -> str:
    """Return the figure as an <svg> element to put into HTML.

    `name` keeps its ids apart from those of the page's other pictures.
    """
    from html import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?) ?(?:width|height)="[^"]*pt" ?', r"<svg \1 ", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return use_variables(svg.replace("'DejaVu Sans'", "system-ui, sans-serif"))


def _draw(axes: "Axes", line: Line, *, thin: bool) -> None:
    style = (0, (3, 2)) if line.dashed else "-"
    values = smoothed(line.values) if line.smooth else list(line.values)
    if line.raw:
        axes.plot(line.steps, line.values, color=line.colour, alpha=0.35, linewidth=1, solid_capstyle="round")
    axes.plot(
        line.steps,
        values,
        color=line.colour,
        linewidth=1.6 if thin else 1.9,
        linestyle=style,
        solid_capstyle="round",
        solid_joinstyle="round",
    )
    if values:
        axes.plot(line.steps[-1:], values[-1:], "o", color=line.colour, markersize=3 if thin else 4, clip_on=False)


def _style(axes: "Axes", *, ticks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.08)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))
