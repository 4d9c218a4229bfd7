"""What `malora plan` prints."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from malora_dist.optimizers.registry import DEFAULT, optimizer_spec
from malora_dist.plan.advice import CAUSES, fastest_that_fits
from malora_dist.plan.estimate import Estimate
from malora_dist.plan.parameters import trainable_parameters
from malora_dist.plan.units import GIB, show_bytes, show_seconds

KINDS = {
    "base_4bit": "base, 4-bit codes and scales",
    "base_other": "base, embeddings, head, norms",
    "adapters": "adapters (fp32)",
    "master": "fp32 master of the trained part",
    "moments": optimizer_spec(DEFAULT).state_label,
    "gradients": "gradients",
    "reduce_bucket": "DeepSpeed's gradient bucket",
    "task_gradients": "gradients of S_A by task",
    "weight_copies": "adapters in the base's dtype",
    "gathered": "weights gathered by ZeRO-3",
    "dequantised": "one unpacked 4-bit weight",
    "activations": "activations",
    "logits": "logits",
    "exchange": "exchange buffers of one layer",
}
SHOWN_PLANS = 6


def tables(chosen: Estimate, plans: Sequence[Estimate], advice: Sequence[str]) -> Iterator[Table | Text]:
    """Yield heading, memory, traffic and time, alternatives, advice."""
    yield Text(heading(chosen), style="bold")
    yield _memory(chosen)
    yield _step(chosen)
    yield _plans(chosen, plans)
    for sentence in advice:
        yield Text(f"- {sentence}")


def heading(chosen: Estimate) -> str:
    """Write one line with the model, the cluster and the batch."""
    run, hardware = chosen.run, chosen.hardware
    return (
        f"{run.shape.num_parameters / 1e9:.3g} B base, {trainable_parameters(run):,} trained; "
        f"{hardware.nodes} x {hardware.gpus_per_node} GPUs of {hardware.hbm / GIB:.4g} GiB; ZeRO-{run.zero_stage}, "
        f"ep_size {run.ep_size}; {run.micro_batch} samples x {run.tokens_per_sample} tokens x {run.accumulation} "
        f"micro-batches a GPU and step; {run.attention} attention{' over whole masked rows' if run.masked else ''}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _memory(chosen: Estimate) -> Table:
    table = _table("memory of a GPU", "bytes", "share")
    total = chosen.memory["total"]
    names = KINDS | {"moments": optimizer_spec(chosen.run.optim).state_label}
    for kind, name in names.items():
        size = chosen.memory[kind]
        if size:
            table.add_row(name, show_bytes(size), f"{size / total:.0%}")
    table.add_row("total", show_bytes(total), "fits" if chosen.fits else "does not fit", style="bold")
    return table


def _step(chosen: Estimate) -> Table:
    table = _table("step of a GPU", "sent", "time without overlap")
    for cause, name in CAUSES.items():
        seconds = chosen.seconds[cause]
        if seconds:
            moved = show_bytes(chosen.traffic[cause]) if cause != "compute" else ""
            table.add_row(name, moved, show_seconds(seconds))
    rate = f"{show_seconds(chosen.seconds['total'])}, {chosen.tokens_per_second:,.0f} tokens/s"
    table.add_row("total", "", rate, style="bold")
    return table


def _plans(chosen: Estimate, plans: Sequence[Estimate]) -> Table:
    """Return the table of the fastest legal plans, the chosen one and the fastest that fits among them."""
    table = _table("ZeRO", "ep_size", "recompute", "samples", "memory", "step", "")
    best = fastest_that_fits(plans)
    shown = [plan for plan in plans if plan.fits][:SHOWN_PLANS] or sorted(plans, key=lambda plan: plan.memory["total"])[
        :SHOWN_PLANS
    ]
    if all(plan.settings != chosen.settings for plan in shown):
        shown.append(chosen)
    for plan in shown:
        marks = [
            "this recipe" if plan.settings == chosen.settings else "",
            "fastest that fits" if plan is best else "",
            "" if plan.fits else "does not fit",
        ]
        run = plan.run
        table.add_row(
            str(run.zero_stage),
            str(run.ep_size),
            "on" if run.checkpointing else "off",
            str(run.micro_batch),
            show_bytes(plan.memory["total"]),
            show_seconds(plan.seconds["total"]),
            ", ".join(mark for mark in marks if mark),
        )
    return table
