"""The report's page: what its sections show, each of which says so if the run lacks it. page.html is how it looks.

Values are text and become HTML in the template alone, which escapes all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from malora_dist.adapters.methods import METHODS
from malora_dist.report import figures, routing
from malora_dist.report.facts import Fact, key_facts, run_facts
from malora_dist.report.inputs import RunFiles
from malora_dist.report.results import Results, headline, improvements, percent, read_results
from malora_dist.report.tables import Table, counts_table, loss_table, results_table
from malora_dist.report.theme import stylesheet, task_variable
from malora_dist.tracking.metrics import GRAD_NORM, LEARNING_RATE, PEAK_MEMORY_GIB, TOKENS_PER_SECOND

_ERRORS = (
    "Accuracy in %, ± one standard error. Improved or worse: by more than 2 standard errors of the difference, which "
    "takes the two measurements as independent. Both use the same questions, so this mostly errs on the safe side. "
    "Majority: always giving the commonest answer."
)
_BARS = "Hollow: zero-shot. Filled: tuned. Bars: ± 2 standard errors. Upright tick: always the commonest answer."
_NO_PICTURES = (
    "Pictures are left out, as matplotlib is not installed: after pip install "
    '"malora_dist[report]", malora report draws them.'
)
_LOSSES = "Nats per token. In the colour of the text: all tasks, raw and smoothed. Other colours: each task."
_SEPARATION = (
    "Share of choices a task would have to change to choose as the tasks do on average. "
    "0: all tasks use the same experts. Pale: each layer."
)


@dataclass(frozen=True)
class Figure:
    """A picture, with what stands above it; the picture is SVG that goes into the page as it is."""

    title: str
    caption: str
    picture: Any


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a section shows: sentences on what is missing, tables, pictures, and those of single tasks or layers."""

    notes: Sequence[str] = ()
    accuracies: Table | None = None
    chart: Figure | None = None
    losses: Table | None = None
    errors: str = _ERRORS
    figures: Sequence[Figure] = ()
    tasks: Sequence[str] = ()
    by_task: Sequence[Figure] = ()
    by_layer: Sequence[Figure] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)
    config_text: str = ""


def build_page(run: RunFiles) -> str:
    """Return the whole HTML document; nothing in it refers to another file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("malora_dist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    results = read_results(run.evaluations, run.tasks)
    model = run_facts(run).get("base model")
    text = environment.get_template("page.html").render(
        name=run.name,
        model=model.value if model is not None else "",
        style=Markup(stylesheet()),
        colours={name: task_variable(index) for index, name in enumerate(run.tasks)},
        title=headline(results) or "Training run",
        lead=" ".join(filter(None, [_gain(results), improvements(results)])),
        tiles=key_facts(run),
        results=_results(run, results),
        training=_training(run),
        routing=_routing(run),
        counts=counts_table(run.counts),
        the_run=_facts(run),
    )
    return text.lstrip()


def _gain(results: Results) -> str:
    average = results.average
    if average is None:
        return ""
    gain, error = percent(average.difference, sign=True), percent(average.difference_stderr)
    return f"{gain} ± {error} points on average."


def _results(run: RunFiles, results: Results) -> Section:
    if not results.tasks:
        return Section(notes=["There is no eval.json, so accuracies are left out."])
    names = {"base": "the untouched base", "tuned": "the tuned model"}
    absent = [name for side, name in names.items() if side not in run.evaluations]
    chart = figures.accuracy_chart(results, run.tasks) if _can_draw() else None
    return Section(
        notes=[f"eval.json does not hold {name}, so nothing is compared." for name in absent],
        accuracies=results_table(results),
        chart=None if chart is None else _figure("Accuracy", _BARS, chart),
        losses=loss_table(results),
    )


def _training(run: RunFiles) -> Section:
    if not _can_draw():
        return Section(notes=[_NO_PICTURES])
    loss = figures.loss_chart(run)
    if loss is None:
        return Section(notes=["There are no training records in metrics.jsonl, so the curves are left out."])
    by_task = figures.task_loss_charts(run)
    validation = figures.validation_chart(run)
    pair = [
        _figure("Loss", _LOSSES, loss),
        *_optional("Validation accuracy", "Each task, measured while training.", validation),
        *_cost_charts(run),
    ]
    steps = ", ".join(str(step) for step in run.non_finite_steps)
    return Section(
        notes=[f"Numbers that are not finite are left out of the curves, at step {steps}."] if steps else (),
        figures=pair,
        tasks=list(by_task),
        by_task=[_figure(task, "", svg) for task, svg in by_task.items()],
    )


def _cost_charts(run: RunFiles) -> list[Figure]:
    charts = {
        LEARNING_RATE: ("Learning rate", "As the optimizer used it."),
        GRAD_NORM: ("Gradient norm", "Before clipping."),
        TOKENS_PER_SECOND: ("Throughput", "Tokens a second, over all processes."),
        PEAK_MEMORY_GIB: ("Peak memory", "GiB, the process that held most so far."),
    }
    return [
        drawn
        for metric, (title, caption) in charts.items()
        for drawn in _optional(title, caption, figures.metric_chart(run, metric, label=f"{title} over steps"))
    ]


def _routing(run: RunFiles) -> Section:
    record = run.routing
    if record is None or not routing.mean_shares(record):
        return Section(
            notes=[f"There is no routing to show: {_why_no_routing(str(run.setting('adapter', 'method')))}."]
        )
    if not _can_draw():
        return Section(notes=[_NO_PICTURES])
    experts = len(next(iter(routing.mean_shares(record).values()), [])) or 1
    reduction = run.setting("adapter", "router_aux_loss_reduction")
    even = 1.0 if reduction == "mean" else None
    caption = "1 (dashed): all experts equally used." if even else f"Its {reduction or 'value'} over routers."
    shares = _share_caption(len(routing.layer_names(record)), experts)
    maps = routing.layer_heat_maps(record, run.tasks)
    return Section(
        figures=[
            _figure("Tasks and experts", shares, routing.mean_heat_map(record)),
            *_optional("How far tasks part", _SEPARATION, routing.separation_chart(record)),
            *_optional("Balance loss", caption, figures.balance_chart(run, even)),
        ],
        tasks=[task for task in run.tasks if task in routing.mean_shares(record)],
        by_layer=[_figure(routing.short_layer(layer), "", svg) for layer, svg in maps.items()],
    )


def _why_no_routing(method: str) -> str:
    structure = METHODS.get(method)
    if structure is not None and not structure.routed:
        return f"{method} has one expert"
    if structure is not None and structure.dense:
        return f"every token uses every expert of {method}"
    return "metrics.jsonl holds no routing record"


def _share_caption(layers: int, experts: int) -> str:
    return (
        f"Per cent of a task's choices that went to each expert, averaged over {layers} layers; "
        f"{100 / experts:.3g} is even. Experts of different layers share nothing but their number."
    )


def _facts(run: RunFiles) -> Section:
    notes = []
    if not run.run:
        notes.append("metrics.jsonl holds no record of the run's processes, so their number is left out.")
    if run.missing:
        notes.append(f"Not in the run folder: {', '.join(run.missing)}.")
    return Section(facts=run_facts(run), notes=notes, config_text=run.config_text)


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _figure(title: str, caption: str, svg: str) -> Figure:
    from markupsafe import Markup

    return Figure(title, caption, Markup(svg))


def _optional(title: str, caption: str, svg: str | None) -> list[Figure]:
    return [] if svg is None else [_figure(title, caption, svg)]
