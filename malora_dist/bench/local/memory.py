"""`malora bench memory`: the most memory a training step needs, and what a 4-bit base saves and costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from malora_dist.bench.local.allocation import (
    frozen_tensors,
    optimizer_tensors,
    peak_above,
    storage_bytes,
    trained_tensors,
)
from malora_dist.bench.local.equal_work import check_losses
from malora_dist.bench.local.losses import LOSSES
from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.bench.local.model_bytes import model_records
from malora_dist.bench.local.models import SMOLLM2
from malora_dist.bench.local.options import BASES, command_line, default_names, labelled_share, one_of, short_dtype
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.bench.local.records import Measurement, Report
from malora_dist.bench.local.step_setup import StepOptions, StepSetup, first_steps
from malora_dist.bench.local.timing import interleave, records_of
from malora_dist.bench.local.trainee import Trainee

MIB = 2**20
AGAINST = "peft_lora_equal"
DEFAULT = ("base", AGAINST, "peft_lora_fp32_equal", "peft_lora", "lora_equal", "malora", "molora")
TIMED = ("base", "malora")
SWITCH = {"off": False, "on": True}


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The command line of `malora bench memory`."""

    model: str = SMOLLM2
    batch: int = 4
    length: int = 256
    dtype: str = "bf16"
    base: str = "full,nf4"
    checkpointing: str = "off,on"
    dropout: float = 0.0
    labels: str = "all"
    loss: str = "hf"
    only: str | None = None
    repeats: int = 5
    warmup: int = 1
    threads: int | None = None
    device: str = "cpu"

    def of_step(self, base: str) -> StepOptions:
        """Return the options of `malora bench step` for the same model and batch."""
        return StepOptions(
            model=self.model,
            batch=self.batch,
            length=self.length,
            dtype=self.dtype,
            base=base,
            dropout=self.dropout,
            labels=self.labels,
            loss=self.loss,
            device=self.device,
        )


def run(options: MemoryOptions, output: Output) -> Report:
    """Measure every case and write the report. Raises ConfigError for impossible options."""
    output.check()
    options = replace(options, dtype=short_dtype(options.dtype))
    one_of("--loss", options.loss, LOSSES)
    bases = [one_of("--base", part.strip(), BASES) for part in options.base.split(",")]
    recompute = [one_of("--checkpointing", part.strip(), SWITCH) for part in options.checkpointing.split(",")]
    labelled_share(options.labels)
    device = ready_device(options.device, options.threads, options.dtype)
    names = [name for name in DEFAULT if name in default_names(options.dtype)]
    baselines = taking_part(options.only, names, device)
    machine = describe(device)
    peft = any(baseline.maker == "peft" for baseline in baselines.values())
    setups = {base: StepSetup(options.of_step(base), device, peft=peft) for base in dict.fromkeys(bases)}
    records = [
        record for setup in setups.values() for switch in recompute for record in peaks(setup, baselines, switch)
    ]
    for setup in setups.values():
        records += model_records(setup, baselines)
    if len(setups) > 1:
        records += _times(setups, baselines, options)
    report = Report(machine, command_line("memory", options), records)
    output.put(report)
    return report


def peaks(setup: StepSetup, baselines: Mapping[str, Baseline], checkpointing: str) -> list[Measurement]:
    """Measure each baseline's peak in its second step, when the optimizer's state exists; one at a time."""
    title = setup.title(f"memory of a step, checkpointing {checkpointing}")
    records: list[Measurement] = []
    losses: dict[str, float] = {}
    for name, baseline in baselines.items():
        trainee = setup.trainee(baseline)
        if SWITCH[checkpointing]:
            recompute_blocks(trainee.adapted.model)
        facts = first_steps({name: trainee}, setup.dtype)[name]
        losses[name] = float(facts["first loss"])  # type: ignore[arg-type]
        records.append(_peak(name, title, trainee, facts, setup.device))
    check_losses(losses, setup.dtype)
    return _with_ratios(records)


def recompute_blocks(model: Any) -> None:
    """Enable activation checkpointing as training does."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _peak(name: str, title: str, trainee: Trainee, facts: dict[str, object], device: torch.device) -> Measurement:
    """Measure a baseline's peak_bytes: model, optimizer and batch, and what the step needs on top.

    What is kept between steps is counted by its tensors, so that others' memory in this process does not count.
    """
    for layer in trainee.adapted.routers:
        # A dispatched layer's recomputation leaves the routing of the last step behind, which a step would release.
        layer.routing = None
    model = trainee.adapted.model
    base, adapters = storage_bytes([*frozen_tensors(model), *model.buffers()]), storage_bytes(trained_tensors(model))
    state = storage_bytes(optimizer_tensors(trainee.optimizer))
    batch = storage_bytes([trainee.batch.ids, trainee.batch.labels])
    above = peak_above(trainee, device)
    parts = {"base": base, "adapters": adapters, "optimizer": state, "above": above}
    facts = {**facts, **{f"MiB {part}": nbytes / MIB for part, nbytes in parts.items()}}
    return Measurement(name, title, peak_bytes=base + adapters + state + batch + above, facts=facts)


def _with_ratios(records: Sequence[Measurement]) -> list[Measurement]:
    """Return the peaks with ratios to PEFT's LoRA at equal parameters; they are exact, so there are no quartiles."""
    against = next((record.peak_bytes for record in records if record.name == AGAINST), None)
    if against is None:
        return list(records)
    return [replace(record, ratio=(record.peak_bytes or 0) / against, against=AGAINST) for record in records]


def _times(
    setups: Mapping[str, StepSetup], baselines: Mapping[str, Baseline], options: MemoryOptions
) -> list[Measurement]:
    """Time a step on each base, in turns; the ratio is to the same baseline on the first base."""
    if options.repeats == 0:
        return []
    names = [name for name in TIMED if name in baselines]
    trainees = {f"{name}_{base}": setup.trainee(baselines[name]) for name in names for base, setup in setups.items()}
    first = next(iter(setups.values()))
    times = interleave(trainees, repeats=options.repeats, warmup=options.warmup, device=first.device)
    title = f"step by base: {options.model}, {options.batch} x {options.length} tokens, {options.dtype}"
    return [record for name in names for record in _of_one(name, title, times, list(setups))]


def _of_one(name: str, title: str, times: Mapping[str, Sequence[float]], bases: Sequence[str]) -> Iterator[Measurement]:
    own = {f"{name}_{base}": times[f"{name}_{base}"] for base in bases}
    yield from records_of(title, own, f"{name}_{bases[0]}")
