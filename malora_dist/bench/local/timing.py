"""Seconds of several subjects that take turns, and their ratios round by round."""

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from malora_dist.bench.local.records import Measurement
from malora_dist.bench.results import quartiles
from malora_dist.errors import ConfigError


def interleave(
    subjects: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int, device: torch.device | str
) -> dict[str, list[float]]:
    """Return the seconds of each subject in each of `repeats` rounds, after `warmup` rounds that are not kept.

    Each round runs all of them once, in a random order that is the same in every run: whatever slows the machine slows
    all equally, and none always follows the same one. A CUDA device is synchronised before and after each turn.
    """
    names, draw = list(subjects), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, repeats):
        for name in draw.sample(names, len(names)):
            taken = _seconds(subjects[name], torch.device(device))
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def _seconds(subject: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    subject()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference(wanted: str | None, names: Collection[str]) -> str:
    """Return the ratios' baseline: `wanted`, peft_lora or the first. Raises ConfigError if `wanted` takes no part."""
    if wanted is not None and wanted not in names:
        raise ConfigError(f"--against {wanted!r} takes no part: {', '.join(names)}")
    return wanted or ("peft_lora" if "peft_lora" in names else next(iter(names)))


def records_of(
    case: str,
    times: Mapping[str, Sequence[float]],
    against: str,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Measurement]:
    """Return each subject's record, with its facts: median seconds, and the ratio to `against` in the same round."""
    records = []
    for name, seconds in times.items():
        ratios = [mine / other for mine, other in zip(seconds, times[against], strict=True)]
        records.append(
            Measurement(
                name,
                case,
                median_s=median(seconds),
                ratio=median(ratios),
                ratio_quartiles=quartiles(ratios),
                against=against,
                facts=dict((facts or {}).get(name, {})),
            )
        )
    return records
