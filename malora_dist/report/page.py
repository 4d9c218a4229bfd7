"""The report's page: sections in reading order, each of which says so if the run lacks what it shows."""

from collections.abc import Mapping
from html import escape

from malora_dist.metrics import GRAD_NORM, LEARNING_RATE, PEAK_MEMORY_GIB, TOKENS_PER_SECOND
from malora_dist.report import figures, routing
from malora_dist.report.facts import key_facts, run_facts
from malora_dist.report.inputs import RunFiles
from malora_dist.report.results import Results, headline, improvements, percent, read_results
from malora_dist.report.tables import counts_table, fact_list, loss_table, results_table, task_legend
from malora_dist.report.theme import stylesheet


def build_page(run: RunFiles) -> str:
    """The whole HTML document; nothing in it refers to another file."""
    results = read_results(run.evaluations, run.tasks)
    body = "\n".join(
        (
            _header(run, results),
            _section("Results", _results(run, results)),
            _section("Training", _training(run)),
            _section("Routing", _routing(run)),
            _section("Data", _data(run)),
            _section("The run", _facts(run)),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)} – malora_dist</title>\n<style>\n{stylesheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(run: RunFiles, results: Results) -> str:
    model = run_facts(run).get("base model")
    line = escape(run.name) + (f" · {model}" if model else "")
    title = headline(results) or "Training run"
    lead = " ".join(filter(None, [_gain(results), escape(improvements(results))]))
    facts = key_facts(run)
    tiles = fact_list(facts, "tiles") if facts else ""
    return f'<header><p class="run">{line}</p><h1>{title}</h1><p class="lead">{lead}</p>{tiles}</header>'


def _gain(results: Results) -> str:
    average = results.average
    if average is None:
        return ""
    gain, error = percent(average.difference, sign=True), percent(average.difference_stderr)
    return f"{gain} ± {error} points on average."


def _results(run: RunFiles, results: Results) -> str:
    if not results.tasks:
        return _note("There is no eval.json, so accuracies are left out.")
    table, chart = results_table(results, run.tasks), figures.accuracy_chart(results, run.tasks)
    more = loss_table(results, run.tasks)
    parts = [_missing_side(run)]
    if chart is not None:
        caption = (
            "Hollow: zero-shot. Filled: tuned. Bars: ± 2 standard errors. Upright tick: always the commonest answer."
        )
        parts.append(
            f'<div class="beside"><div>{table}{_note(_ERRORS)}</div>{_figure("Accuracy", caption, chart)}</div>'
        )
    if more:
        summary = "Held-out loss, and accuracy per character"
        parts.append(more if chart is None else f"<details><summary>{summary}</summary>{more}</details>")
    return "".join(parts)


_ERRORS = (
    "Accuracy in %, ± one standard error. Improved or worse: by more than 2 standard errors of the difference, which "
    "takes the two measurements as independent. Both use the same questions, so this mostly errs on the safe side. "
    "Majority: always giving the commonest answer."
)


def _missing_side(run: RunFiles) -> str:
    names = {"base": "the untouched base", "tuned": "the tuned model"}
    absent = [name for side, name in names.items() if side not in run.evaluations]
    return "".join(_note(f"eval.json does not hold {name}, so nothing is compared.") for name in absent)


def _training(run: RunFiles) -> str:
    loss = figures.loss_chart(run)
    if loss is None:
        return _note("There are no training records in metrics.jsonl, so the curves are left out.")
    by_task = figures.task_loss_charts(run)
    legend = task_legend(list(by_task), run.tasks)
    pair = [
        _figure(
            "Loss",
            "Nats per token. In the colour of the text: all tasks, raw and smoothed. Other colours: each task.",
            loss,
        ),
        _optional("Validation accuracy", "Each task, measured while training.", figures.validation_chart(run)),
        *_cost_charts(run),
    ]
    small = "".join(_figure(escape(task), "", svg) for task, svg in by_task.items())
    tasks = (
        f'<h3>Loss by task</h3><p class="note">Pale: as logged. Strong: smoothed.</p><div class="many">{small}</div>'
    )
    return f'{legend}<div class="pair">{"".join(pair)}</div>{tasks if by_task else ""}{_not_finite(run)}'


def _not_finite(run: RunFiles) -> str:
    steps = ", ".join(str(step) for step in run.non_finite_steps)
    return _note(f"Numbers that are not finite are left out of the curves, at step {steps}.") if steps else ""


def _cost_charts(run: RunFiles) -> list[str]:
    charts = {
        LEARNING_RATE: ("Learning rate", "As the optimizer used it.", True),
        GRAD_NORM: ("Gradient norm", "Before clipping.", True),
        TOKENS_PER_SECOND: ("Throughput", "Tokens a second, over all processes.", True),
        PEAK_MEMORY_GIB: ("Peak memory", "GiB, the process that held most so far.", True),
    }
    return [
        _optional(title, caption, figures.metric_chart(run, metric, label=f"{title} over steps", from_zero=zero))
        for metric, (title, caption, zero) in charts.items()
    ]


def _routing(run: RunFiles) -> str:
    method = run.setting("adapter", "method")
    if run.routing is None or not routing.mean_shares(run.routing):
        reasons = {"lora": "lora has one expert", "dora": "dora has one expert"}
        reasons["hydralora"] = "every token uses every expert of hydralora"
        return _note(f"There is no routing to show: {reasons.get(method, 'metrics.jsonl holds no routing record')}.")
    experts = len(next(iter(routing.mean_shares(run.routing).values()), [])) or 1
    reduction = run.setting("adapter", "router_aux_loss_reduction")
    even = 1.0 if reduction == "mean" else None
    caption = "1 (dashed): all experts equally used." if even else f"Its {reduction or 'value'} over routers."
    layers = len(routing.layer_names(run.routing))
    pair = [
        _figure("Tasks and experts", _share_caption(layers, experts), routing.mean_heat_map(run.routing)),
        _optional("How far tasks part", _SEPARATION, routing.separation_chart(run.routing)),
        _optional("Balance loss", caption, figures.balance_chart(run, even)),
        _layer_maps(run, run.routing),
    ]
    return f'<div class="pair">{"".join(pair)}</div>'


def _share_caption(layers: int, experts: int) -> str:
    return (
        f"Per cent of a task's choices that went to each expert, averaged over {layers} layers; "
        f"{100 / experts:.3g} is even. Experts of different layers share nothing but their number."
    )


_SEPARATION = (
    "Share of choices a task would have to change to choose as the tasks do on average. "
    "0: all tasks use the same experts. Pale: each layer."
)


def _layer_maps(run: RunFiles, record: Mapping[str, object]) -> str:
    maps = routing.layer_heat_maps(record, run.tasks)
    small = "".join(_figure(escape(routing.short_layer(layer)), "", svg) for layer, svg in maps.items())
    legend = task_legend([task for task in run.tasks if task in routing.mean_shares(record)], run.tasks)
    note = _note("Experts across, tasks down; all maps have one scale of colour.")
    return f'<div><h3>Single layers</h3>{note}{legend}<div class="many">{small}</div></div>'


def _data(run: RunFiles) -> str:
    if not run.counts:
        return _note("There is no data.json, so the rows of each task are left out.")
    return counts_table(run.counts, run.tasks)


def _facts(run: RunFiles) -> str:
    parts = [fact_list(run_facts(run), "facts")]
    if not run.run:
        parts.append(_note("metrics.jsonl holds no record of the run's processes, so their number is left out."))
    if run.missing:
        parts.append(_note(f"Not in the run folder: {escape(', '.join(run.missing))}."))
    if run.config_text:
        parts.append(f"<details><summary>The whole config.yaml</summary><pre>{escape(run.config_text)}</pre></details>")
    return "".join(parts)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _figure(title: str, caption: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{title}</strong>{caption}</figcaption>{svg}</figure>"


def _optional(title: str, caption: str, svg: str | None) -> str:
    return "" if svg is None else _figure(title, caption, svg)


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'
