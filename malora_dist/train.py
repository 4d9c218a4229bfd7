"""`deepspeed --module malora_dist.train recipe.yaml [--section.key value ...]`: a run from its recipe to its report.

Read `run` as the table of contents; every line is a module of its own. The same file runs under `deepspeed`,
`torchrun`, `srun` and plain `python`. Started again, it goes on where it was stopped.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.config import config_text, load_config, plain_config, split_arguments
from malora_dist.config.compatibility import check_plan
from malora_dist.config.resume_compatibility import decisive
from malora_dist.data.build import PreparedData
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.consistency import SHARED_SECONDS, check_consistency, check_shared_folder, start_facts
from malora_dist.distributed.expert_groups import create_expert_groups
from malora_dist.distributed.process_groups import start_processes
from malora_dist.distributed.rank_errors import run_on_rank0
from malora_dist.distributed.zero3 import resident_bytes
from malora_dist.errors import NonFiniteError
from malora_dist.evaluation.packing import check_packing
from malora_dist.files import run_files
from malora_dist.launch.ranks import place_of
from malora_dist.tracking.trackers import check_trackers
from malora_dist.training.base_model import base_dtype, base_identity, base_model
from malora_dist.training.best_checkpoint import Tasks
from malora_dist.training.checkpoints import RunCheckpoints
from malora_dist.training.deepspeed_engine import build_engine
from malora_dist.training.deterministic import explained, use_deterministic_algorithms
from malora_dist.training.device_check import check_device, check_memory, first_lengths
from malora_dist.training.evaluations import RunEvaluations, stored_baseline
from malora_dist.training.inputs import Inputs, open_inputs
from malora_dist.training.loop import Actions, train_loop
from malora_dist.training.preemption import Preempted, PreemptionCoordinator, StopRequest, deadline_of
from malora_dist.training.process import run_as_process
from malora_dist.training.resume import check_base, check_data, open_checkpoint
from malora_dist.training.run_context import RunContext
from malora_dist.training.run_lifecycle import RunLifecycle
from malora_dist.training.run_logger import RunLogger
from malora_dist.training.setup import (
    add_adapters,
    engine_config,
    loop_settings,
    new_train_step,
    optimizer_settings,
    total_steps,
    train_loader,
    unseen_tasks,
)
from malora_dist.training.train_step import TrainStep
from malora_dist.training.training_state import TrainingParts
from malora_dist.training.watchdog import Watchdog, watched


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the recipe says; return the exit code, see docs/checkpoints.md."""
    return run_as_process(lambda: _start(sys.argv[1:] if arguments is None else arguments))


def _start(arguments: Sequence[str]) -> None:
    started = time.time()
    recipe, overrides = split_arguments(arguments)
    config = load_config(recipe, overrides)
    check_trackers(config.train.report_to)
    if config.train.deterministic:
        use_deterministic_algorithms()
    watchdog, stop = Watchdog(place_of(os.environ)[0]), StopRequest()
    with watched(watchdog, config.parallel.timeout_seconds, stop.set):
        world = start_processes(config.parallel.timeout_seconds)
        # Thousands of processes must not all ask the scheduler.
        ends = run_on_rank0(lambda: deadline_of(config.train.max_hours, started), world)
        # Of the clocks, only that of one process may tell all of them to stop.
        deadline = ends if world.is_main else None
        nodes = check_consistency(world, start_facts(config_text(config)))
        check_plan(config, world.size)
        # Half the timeout, so that it is not the others' wait that ends the run.
        seconds = min(SHARED_SECONDS, config.parallel.timeout_seconds / 2)
        check_shared_folder(world, Path(config.output_dir), nodes, seconds)
        with RunLifecycle(config, world) as lifecycle:
            preemption = PreemptionCoordinator(world, stop, deadline, heartbeat=watchdog.heartbeat)
            context = RunContext(config, world, watchdog, preemption)
            context.poll()
            with explained():
                run(lifecycle, context)


def run(lifecycle: RunLifecycle, context: RunContext) -> Path:
    """Run the recipe, or what is left of a run of it; return the run's folder.

    Raises:
        Preempted: on every process, with everything saved, if the run is to stop early.
    """
    config, world = context.config, context.world
    inputs = _read_inputs(context)
    data, folder = inputs.data, inputs.folder
    baseline = run_on_rank0(lambda: stored_baseline(config, data), world)
    # Opened only now, so that a mistake in the tasks does not use up the run's name.
    logger = lifecycle.open()
    logger.notes([*check_plan(config, world.size).notes, *inputs.notes])
    logger.data(data)
    logger.notes(inputs.data_notes)

    base = base_identity(config, folder, world)
    if not lifecycle.resume_point.goes_on:
        logger.measured_on({"recipe": decisive(plain_config(config)), "base": base, "rows": data.digests})
    loader = train_loader(config, data, world)
    logger.notes(unseen_tasks(config, data, loader))
    logger.notes(check_memory(config, folder, world, first_lengths(loader, data.train)))
    checkpoint = _open_checkpoint(lifecycle, base, data, loader)
    train_step = _build(context, logger, inputs, loader, init_weights=checkpoint is None)
    packing = check_packing(train_step.engine, world, config.train.per_device_train_batch_size, data.longest)
    parts = TrainingParts.of(train_step, loader, config.train.optim)
    checkpoints = RunCheckpoints(logger, parts, base, data.digests)
    context = context.with_background(checkpoints.saver)
    _resume(lifecycle, logger, checkpoints, checkpoint)
    evaluations = RunEvaluations(context, data, train_step, packing, logger)
    try:
        _train(lifecycle, context, parts, checkpoints, evaluations, baseline)
    except (Preempted, NonFiniteError):
        checkpoints.complete()
        raise
    context.watchdog.mark_phase("finishing the report")
    logger.finish()
    return logger.folder


def _read_inputs(context: RunContext) -> Inputs:
    """Check the device, find and check the base model, and prepare the data, with notes on all of them."""
    config, world = context.config, context.world
    notes, dtype = check_device(config, world), base_dtype(config, world)
    with context.while_waiting() as poll:
        inputs = open_inputs(config, dtype, world.device, poll)
    return replace(inputs, notes=(*notes, *inputs.notes))


def _open_checkpoint(
    lifecycle: RunLifecycle, base: Mapping[str, str | None], data: PreparedData, loader: TrainLoader
) -> Checkpoint | None:
    """Open what the run goes on from, checked before any weight is loaded; `loader` then begins where it was saved."""
    if lifecycle.resume_point.checkpoint is None:
        return None
    checkpoint = open_checkpoint(Path(lifecycle.resume_point.checkpoint), lifecycle.world)
    check_base(checkpoint.manifest, base)
    check_data(checkpoint.manifest, data.digests)
    loader.load_state_dict(checkpoint.manifest.state["loader"])
    return checkpoint


def _build(
    context: RunContext, logger: RunLogger, inputs: Inputs, loader: TrainLoader, *, init_weights: bool
) -> TrainStep:
    """Load the base, add adapters, with initial values or to be restored, and start DeepSpeed's engine."""
    config, world = context.config, context.world
    context.watchdog.mark_phase("loading the base model")
    settings = engine_config(config, world)
    groups = create_expert_groups(config.parallel.ep_size, config.parallel.timeout_seconds)
    model = base_model(context, inputs.folder, settings)
    report, all_to_all = add_adapters(model, context, settings, groups, init_weights=init_weights)
    logger.injection(report)
    steps = total_steps(config, loader)
    context.watchdog.mark_phase("starting DeepSpeed")
    engine = build_engine(
        model,
        settings,
        optimizer_settings(config, steps),
        zero_stage=config.parallel.zero_stage,
        timeout_seconds=config.parallel.timeout_seconds,
        expert_groups=groups,
    )
    logger.placement(str(model.dtype), resident_bytes(model), steps, loader.steps_per_epoch)
    return new_train_step(context, inputs.data, engine, all_to_all, steps)


def _resume(
    lifecycle: RunLifecycle, logger: RunLogger, checkpoints: RunCheckpoints, checkpoint: Checkpoint | None
) -> None:
    """Restore the run from a checkpoint, if there is one, and let its records go on from there."""
    if checkpoint is not None:
        checkpoints.restore(checkpoint, lifecycle.state)
        logger.resumed(lifecycle.state.step, checkpoint, validated=lifecycle.state.validated)
    elif lifecycle.resume_point.folder is not None:
        logger.resumed(0, None)


def _train(
    lifecycle: RunLifecycle,
    context: RunContext,
    parts: TrainingParts,
    checkpoints: RunCheckpoints,
    evaluations: RunEvaluations,
    baseline: Tasks | None,
) -> None:
    """Measure the base, take the steps that are left, and save and measure the adapter."""
    logger, baseline = evaluations.logger, evaluations.evaluate_base(baseline)
    actions = Actions(
        log=logger.record,
        validate=lambda step: evaluations.validate(step, baseline),
        save=checkpoints.save,
    )
    settings = loop_settings(context.config, parts.loader)
    train_loop(parts, settings, lifecycle.state, actions, context.poll)
    context.watchdog.mark_phase("saving the adapter")
    logger.adapter(parts.train_step.engine.module, run_files.ADAPTER)
    evaluations.evaluate_tuned()
    checkpoints.complete()


if __name__ == "__main__":
    sys.exit(main())
