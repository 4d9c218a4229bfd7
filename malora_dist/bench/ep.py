"""The work of `malora bench ep`: measures variants of a recipe, interleaved.

All variants live in the same processes and take turns on every batch, so that a busy machine slows all of them alike.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from malora_dist.bench.ep_options import EpOptions
from malora_dist.bench.measure import Subject
from malora_dist.bench.results import Result, StepRecord
from malora_dist.bench.table import NOTES, markdown, sheets, step_line
from malora_dist.bench.variants import Selection, Variant, select
from malora_dist.config import RunConfig, load_config
from malora_dist.console.log import console, start_logging
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.process_groups import World, gather_lists
from malora_dist.distributed.rank_errors import run_on_rank0, sharing_errors
from malora_dist.errors import ConfigError
from malora_dist.files.atomic import write_json, write_text
from malora_dist.training.base_model import base_dtype
from malora_dist.training.device_check import check_device, check_memory, first_lengths
from malora_dist.training.inputs import open_inputs
from malora_dist.training.process import run_as_process
from malora_dist.training.setup import train_loader
from malora_dist.training.watchdog import Watchdog, watched


def measure(options: EpOptions) -> int:
    """Measure; return the exit code: 0, 1 for a failure, 2 for a mistake in the recipe or the data."""
    return run_as_process(lambda: _start(options))


def _start(options: EpOptions) -> None:
    from malora_dist.distributed.process_groups import start_processes

    config = load_config(options.recipe, options.overrides)
    world = start_processes(config.parallel.timeout_seconds)
    bench(options, config, world)


def bench(options: EpOptions, config: RunConfig, world: World) -> None:
    """Build every variant, run them in turns, and print and write the results."""
    start_logging(None)
    selection = select(config, world.size, options.topics)
    for note in check_device(config, world):
        _log(world, f"note: {note}")
    watchdog = Watchdog(world.rank)
    with watched(watchdog, config.parallel.timeout_seconds):
        result = _measure(options, config, world, selection, watchdog)
    run_on_rank0(lambda: _show(options, result, world), world)


def _show(options: EpOptions, result: Result, world: World) -> None:
    for sheet in sheets(result):
        console().print(sheet.for_terminal())
    _log(world, "\n".join(NOTES))
    try:
        if options.output.json is not None:
            write_json(options.output.json, result.as_dict())
        if options.output.markdown is not None:
            write_text(options.output.markdown, markdown(result, options.command(world.size)))
    except OSError as error:
        raise ConfigError(f"the result cannot be written: {error}") from error


def _measure(options: EpOptions, config: RunConfig, world: World, selection: Selection, watchdog: Watchdog) -> Result:
    for sentence in selection.left_out:
        _log(world, f"left out: {sentence}")
    load = os.getloadavg()[0]
    dtype = base_dtype(config, world)
    with sharing_errors(world):
        inputs = open_inputs(config, dtype, world.device)
    data, folder = inputs.data, inputs.folder
    loader = train_loader(config, data, world)
    notes = check_memory(selection.variants[0].of(config), folder, world, first_lengths(loader, data.train))
    for note in [*inputs.notes, *inputs.data_notes, *notes]:
        _log(world, f"note: {note}")
    steps = options.warmup + options.steps
    # The recipe's own length, so that the learning rate is that of its first steps.
    length = max(steps, config.train.max_steps or loader.steps_for(config.train.num_train_epochs or 0))
    subjects = []
    for variant in selection.variants:
        _log(world, f"building {variant.name}")
        subjects.append(Subject.build(variant, config, folder, data, world, steps=length, watchdog=watchdog))
    records = _take_turns(subjects, loader, steps, world)
    facts = {
        **_facts(config, world),
        "base computes in": str(subjects[0].dtype).removeprefix("torch."),
        "tokens of a step": round(mean(record.tokens for record in records[selection.variants[0]])),
        "steps": f"{options.steps} measured after {options.warmup} of warm-up",
        "load average before": f"{load:.1f}",
    }
    kept = gather_lists([[subject.kept_bytes for subject in subjects]])
    kept_bytes = {s.variant: mean(part[index] for part in kept) for index, s in enumerate(subjects)}
    return Result(facts, world.size, options.warmup, selection, records, kept_bytes)


def _take_turns(
    subjects: Sequence[Subject], loader: TrainLoader, steps: int, world: World
) -> dict[Variant, list[StepRecord]]:
    """Return every subject's record of every step.

    Each round begins with another subject, so that none always follows the same one.
    """
    records: dict[Variant, list[StepRecord]] = {subject.variant: [] for subject in subjects}
    for number in range(1, steps + 1):
        batches = [batch.to(world.device) for batch in next(loader)]
        begin = (number - 1) % len(subjects)
        for subject in [*subjects[begin:], *subjects[:begin]]:
            records[subject.variant].append(subject.step(number, batches))
        first = records[subjects[0].variant][-1]
        for variant, done in records.items():
            _log(world, step_line(number, steps, variant.name, done[-1], first, world.size))
    return records


def _facts(config: RunConfig, world: World) -> dict[str, Any]:
    train = config.train
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    return {
        "model": Path(config.model.name_or_path).name,
        "a process has": cores if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        "batch": f"{train.global_batch_size} samples a step, {train.per_device_train_batch_size} at a time",
        "torch": torch.__version__,
    }


def _log(world: World, text: str) -> None:
    if world.is_main:
        console().print(text, markup=False, highlight=False, soft_wrap=True)
