"""What a resumed run may say differently from the run it continues, and what would give other numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Keys that no trained number depends on. What base and tasks hold is compared by fingerprints, wherever it lies.
HARMLESS = (
    "output_dir",
    "evaluation.base",
    "evaluation.tuned",
    "evaluation.batch_tokens",
    "evaluation.write_scores",
    "model.name_or_path",
    "model.revision",
    "model.dtype",
    "data.cache_dir",
    "data.tasks",
    "data.split_seed",
    "data.near_duplicate_threshold",
    "data.on_bad_row",
    "data.max_seq_length",
    "parallel.timeout_seconds",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.async_save",
    "train.stop_after_steps",
    "train.max_hours",
    "train.best_metric",
    "train.best_baseline",
    "train.report_to",
    "train.resume_from_checkpoint",
    "launch",
)
# How the same numbers are computed; they agree to rounding.
TOPOLOGY = (
    "model.attn_implementation",
    "adapter.computation",
    "adapter.fuse_projections",
    "train.gradient_checkpointing",
    "train.deterministic",
    "parallel.zero_stage",
    "parallel.ep_size",
    "parallel.ds_config",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Change:
    """A key with the value it had and the one it has; `kind` is `harmless`, `topology` or `refused`."""

    key: str
    before: Any
    now: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the differences of two configs given as plain nested mappings, in the order of their keys.

    A key that one of them lacks counts as None there: another version may have had other keys.
    """
    return [Change(key, old, new, _kind(key)) for key, old, new in _differences(before, now, ())]


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, by key, that trained numbers depend on, from a config given as plain nested mappings."""
    return {key: value for key, value in _leaves(config, "") if _kind(key) == "refused"}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def _differences(before: Any, now: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), (*path, key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, (*path[:-1], f"{path[-1]}[{index}]"))
    elif before != now:
        yield ".".join(path), before, now


def _kind(key: str) -> str:
    if key.startswith("data.tasks[") and key.endswith(".weight"):
        return "refused"  # the only key of a task that its rows do not show
    for kind, keys in (("harmless", HARMLESS), ("topology", TOPOLOGY)):
        if any(key == known or key.startswith((f"{known}.", f"{known}[")) for known in keys):
            return kind
    return "refused"
