"""The facts of a run in words: what was trained, how, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from malora_dist.console.durations import in_words
from malora_dist.report.inputs import RunFiles
from malora_dist.tracking.metrics import (
    BASE_DTYPE,
    BASE_PARAMETERS,
    DEVICE,
    PEAK_MEMORY_GIB,
    STEP,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TRAINABLE_PARAMETERS,
    WORLD_SIZE,
)


@dataclass(frozen=True)
class Fact:
    """A value as text, and what is said of it in small letters."""

    value: str
    note: str = ""


def training_seconds(run: RunFiles) -> float:
    """Sum the seconds spent in steps: each record's mean step time counts for the steps since the record before."""
    total = last = 0.0
    for step, seconds in zip(*run.series(STEP_SECONDS), strict=True):
        total += (step - last) * seconds
        last = step
    return total


def key_facts(run: RunFiles) -> dict[str, Fact]:
    """Return the few numbers for the top of the page; those that are not known are left out."""
    facts = {}
    parameters = run.run.get(TRAINABLE_PARAMETERS, run.parameters)
    if parameters is not None:
        facts["trainable parameters"] = Fact(f"{parameters:,}", _share(parameters, run))
    if run.train:
        facts["training time"] = Fact(in_words(training_seconds(run)), f"{run.train[-1][STEP]:,} steps")
    speeds = run.series(TOKENS_PER_SECOND)[1]
    if speeds:
        facts["tokens per second"] = Fact(f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "median")
    memory = run.series(PEAK_MEMORY_GIB)[1]
    if memory:
        facts["peak memory"] = Fact(f"{max(memory):.2f} GiB", "a process")
    return facts


def run_facts(run: RunFiles) -> dict[str, Fact]:
    """Return the facts about what was run, by name; what is not known is left out."""
    setting = run.setting
    facts = {
        "base model": setting("model", "name_or_path") or run.adapter.get("base_model_name_or_path"),
        "base weights": _base_weights(run),
        "method": _method(run),
        "adapted linears": _listed(setting("adapter", "target_modules") or run.adapter.get("target_modules")),
        "processes": _processes(run),
        "ZeRO stage": setting("parallel", "zero_stage"),
        "batch": _batch(run),
        "learning rate": _learning_rate(run),
        "mixture of tasks": setting("data", "mixture"),
        "loss normalisation": setting("train", "loss_normalization"),
        "seed": setting("train", "seed"),
    }
    return {name: Fact(str(value)) for name, value in facts.items() if value not in (None, "")}


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _short(value: Any) -> str:
    """Format a number without needless digits, and anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _share(parameters: int, run: RunFiles) -> str:
    base = run.run.get(BASE_PARAMETERS)
    return f"{100 * parameters / base:.2f} % of the base" if base else ""


def _base_weights(run: RunFiles) -> str:
    dtype = run.run.get(BASE_DTYPE) or run.setting("model", "dtype")
    if dtype is None:
        return ""
    return f"4-bit {run.setting('model', 'bnb_4bit_quant_type')}, computed in {dtype}" if _in_4bit(run) else str(dtype)


def _in_4bit(run: RunFiles) -> bool:
    return bool(run.setting("model", "load_in_4bit"))


def _method(run: RunFiles) -> str:
    """Describe the method with its numbers.

    They come from the saved adapter, where derived values are filled in, else from the recipe.
    """
    numbers: Mapping[str, Any] = run.adapter.get("malora") or run.config.get("adapter") or {}
    if "method" not in numbers:
        return ""
    names: tuple[str, ...] = ("r", "shared_r", "lora_alpha")
    if numbers.get("num_experts") not in (None, 1):
        names = ("num_experts", "top_k", *names)
    parts = [f"{name} {_short(numbers[name])}" for name in names if numbers.get(name) is not None]
    return f"{numbers['method']}: {', '.join(parts)}"


def _processes(run: RunFiles) -> str:
    if WORLD_SIZE not in run.run:
        return ""
    device = f" on {run.run[DEVICE]}" if DEVICE in run.run else ""
    return f"{run.run[WORLD_SIZE]}{device}"


def _batch(run: RunFiles) -> str:
    size = run.setting("train", "global_batch_size")
    at_a_time = run.setting("train", "per_device_train_batch_size")
    return "" if size is None else f"{size} samples a step, {at_a_time} at a time on each process"


def _learning_rate(run: RunFiles) -> str:
    rate = run.setting("train", "learning_rate")
    return "" if rate is None else f"{_short(rate)}, {run.setting('train', 'lr_scheduler_type')} schedule"
