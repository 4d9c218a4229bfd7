"""Which experts the tasks' tokens went to: heat maps of shares, and how far the tasks part in each layer.

A routing record's `share[task][layer]` is a list of E shares that sum to 1. Shade is opacity of one colour, so that a
map reads the same in light and dark mode.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from malora_dist.report.charts import SMALL_WIDTH, WIDTH, Line, label_ticks, line_chart, picture, place_axes, to_svg
from malora_dist.report.figures import name_margin, shorten
from malora_dist.report.theme import ACCENT, INK, ON_ACCENT, task_colour
from malora_dist.tracking.metrics import SHARE, TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shares = Mapping[str, Sequence[float]]  # task -> its E shares
_MAX_LABELLED = 10  # experts up to which a cell has room for its number


def layer_names(routing: Mapping[str, Any]) -> list[str]:
    """Return the names of the routers of a record, in the model's order."""
    shares: Mapping[str, Any] = routing[SHARE]
    return list(next(iter(shares.values()), {}))


def layer_shares(routing: Mapping[str, Any], layer: str) -> dict[str, list[float]]:
    """Return the shares of each task in one layer; a task without a token there (all 0) is left out."""
    shares = {task: list(routing[SHARE][task][layer]) for task in routing[TASKS]}
    return {task: row for task, row in shares.items() if any(row)}


def mean_shares(routing: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the shares of each task, averaged over layers."""
    layers = [layer_shares(routing, layer) for layer in layer_names(routing)]
    means = {}
    for task in routing[TASKS]:
        rows = [shares[task] for shares in layers if task in shares]
        if rows:
            means[task] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return means


def separation(shares: Shares) -> float:
    """Compute how far the tasks' choices lie from their common mean: 0 all alike, near 1 each task has its own experts.

    It is the mean total variation distance, half the sum of absolute differences.
    """
    if not shares:
        return 0.0
    common = [sum(column) / len(shares) for column in zip(*shares.values(), strict=True)]
    gaps: list[float] = [sum(abs(a - b) for a, b in zip(row, common, strict=True)) / 2 for row in shares.values()]
    return sum(gaps) / len(gaps)


def sample_layers(routing: Mapping[str, Any], count: int = 6) -> list[str]:
    """Return at most `count` layers, evenly spaced from the first to the last."""
    names = layer_names(routing)
    if len(names) <= count:
        return names
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]


def mean_heat_map(routing: Mapping[str, Any]) -> str:
    """Draw the shares averaged over layers: tasks down, experts across, each cell labelled where there is room."""
    shares = mean_shares(routing)
    experts = len(next(iter(shares.values()), []))
    with picture(WIDTH, 28 + 34 * len(shares)) as figure:
        axes = place_axes(figure, left=name_margin(list(shares)), right=2, top=4, bottom=24)
        _cells(axes, shares, full=_darkest(routing), labelled=experts <= _MAX_LABELLED)
        axes.set_yticks(range(len(shares)), [shorten(task) for task in shares], color=INK)
        axes.set_xticks(range(0, experts, 1 + experts // 20))
        label_ticks(axes, "expert")
        return to_svg(figure, "routing", "Share of each task's choices that went to each expert, averaged over layers")


def layer_heat_maps(routing: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, str]:
    """Draw a small map for each of a few layers; rows are marked with the tasks' colours."""
    full = _darkest(routing)
    maps = {}
    for index, layer in enumerate(sample_layers(routing)):
        shares = layer_shares(routing, layer)
        if not shares:
            continue
        with picture(SMALL_WIDTH, 16 * len(shares) + 4) as figure:
            axes = place_axes(figure, left=14, right=2, top=2, bottom=2)
            _cells(axes, shares, full=full, labelled=False)
            for y, task in enumerate(shares):
                axes.plot(-1.0, y, "o", color=task_colour(tasks.index(task)), markersize=5, clip_on=False)
            axes.set_xticks([])
            axes.set_yticks([])
            maps[layer] = to_svg(figure, f"routing-{index}", f"Share of each task's choices by expert in {layer}")
    return maps


def separation_chart(routing: Mapping[str, Any]) -> str | None:
    """Draw the separation of the tasks in each layer, from the first to the last; None with one task."""
    values = [separation(layer_shares(routing, layer)) for layer in layer_names(routing)]
    if len(routing[TASKS]) < 2:
        return None
    line = Line(range(1, len(values) + 1), values, ACCENT, smooth=True, raw=True)
    label = "Distance of the tasks' choices of experts from their mean, by layer"
    return line_chart("separation", [line], label=label, from_zero=True, x_label="layer")


def _darkest(routing: Mapping[str, Any]) -> float:
    """Return the share drawn in full colour, the same on all maps."""
    shown = [mean_shares(routing), *(layer_shares(routing, layer) for layer in sample_layers(routing))]
    return max((value for shares in shown for row in shares.values() for value in row), default=1.0)


def _cells(axes: "Axes", shares: Shares, *, full: float, labelled: bool) -> None:
    from matplotlib.patches import Rectangle

    experts = len(next(iter(shares.values()), []))
    for y, row in enumerate(shares.values()):
        for x, value in enumerate(row):
            strength = value / full
            axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=ACCENT, alpha=strength, linewidth=0))
            if labelled:
                colour = ON_ACCENT if strength > 0.6 else INK
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=10.5)
    axes.set_xlim(-0.5, experts - 0.5)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)


def short_layer(name: str) -> str:
    """Shorten `model.layers.3.self_attn.q_proj` to `layer 3, q_proj`; other names stay as they are."""
    parts = name.split(".")
    depth = next((part for part in parts if part.isdigit()), None)
    return name if depth is None else f"layer {depth}, {parts[-1]}"
