"""`deepspeed --module malora_dist.train recipe.yaml [--section.key value ...]`: a run from its recipe to its report.

Read `run` as the table of contents; every line is a module of its own. The same file runs under `deepspeed`,
`torchrun`, `srun` and plain `python`. Started again, it goes on where it was stopped.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.config import RunConfig, config_text, load_config, plain_config, split_arguments
from malora_dist.config.compatibility import check_plan
from malora_dist.config.resume_compatibility import decisive
from malora_dist.data.build import PreparedData, build_data
from malora_dist.data.loader import TrainLoader
from malora_dist.data.packed_row import Packing
from malora_dist.distributed.consistency import SHARED_SECONDS, check_consistency, check_shared_folder, start_facts
from malora_dist.distributed.expert_groups import create_expert_groups
from malora_dist.distributed.process_groups import run_on_rank0, start_processes
from malora_dist.distributed.zero3 import resident_bytes
from malora_dist.errors import ConfigError, NonFiniteError
from malora_dist.evaluation.packing import check_packing
from malora_dist.evaluation.tasks import evaluate_tasks
from malora_dist.launch.ranks import place_of
from malora_dist.models.attention import attention_for
from malora_dist.models.config import read_model_config
from malora_dist.models.load import load_tokenizer
from malora_dist.models.resolve import resolve_model
from malora_dist.models.vocabulary import check_tokens
from malora_dist.tracking.trackers import check_trackers
from malora_dist.training.base_model import base_dtype, base_identity, base_model
from malora_dist.training.base_support import check_support
from malora_dist.training.best_checkpoint import Best, Tasks, read_baseline
from malora_dist.training.checkpoints import RunCheckpoints
from malora_dist.training.deepspeed_engine import build_engine
from malora_dist.training.deterministic import explained, use_deterministic_algorithms
from malora_dist.training.device_check import check_device, check_memory, first_lengths
from malora_dist.training.loop import Actions, LoopSettings, LoopState, train_loop
from malora_dist.training.preemption import Preempted, PreemptionCoordinator, deadline_of
from malora_dist.training.process import run_as_process
from malora_dist.training.resume import check_base, check_data, open_checkpoint
from malora_dist.training.run_lifecycle import RunLifecycle
from malora_dist.training.run_logger import RunLogger
from malora_dist.training.sequence_lengths import position_notes
from malora_dist.training.setup import (
    add_adapters,
    engine_config,
    new_train_step,
    optimizer_settings,
    total_steps,
    train_loader,
    unseen_tasks,
)
from malora_dist.training.step_metrics import StepMetrics
from malora_dist.training.train_step import TrainStep
from malora_dist.training.watchdog import Watchdog, watched


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the recipe says. Returns the exit code, see docs/checkpoints.md."""
    return run_as_process(lambda: _start(sys.argv[1:] if arguments is None else arguments))


def _start(arguments: Sequence[str]) -> None:
    started = time.time()
    recipe, overrides = split_arguments(arguments)
    config = load_config(recipe, overrides)
    check_trackers(config.train.report_to)
    if config.train.deterministic:
        use_deterministic_algorithms()
    watchdog = Watchdog(place_of(os.environ)[0])
    preemption = PreemptionCoordinator(alive=watchdog.heartbeat)
    with watched(watchdog, config.parallel.timeout_seconds, preemption.request):
        world = start_processes(config.parallel.timeout_seconds)
        watchdog.rank = world.rank
        # Thousands of processes must not all ask Slurm.
        preemption.deadline = deadline_of(config.train.max_hours, started) if world.is_main else None
        nodes = check_consistency(world, start_facts(config_text(config)))
        check_plan(config, world.size)
        # Half the timeout, so that it is not the others' wait that ends the run.
        seconds = min(SHARED_SECONDS, config.parallel.timeout_seconds / 2)
        check_shared_folder(world, Path(config.output_dir), nodes, seconds)
        with RunLifecycle(config, world) as lifecycle:
            preemption.join(world)
            with explained():
                run(lifecycle, watchdog, preemption)


def run(lifecycle: RunLifecycle, watchdog: Watchdog, preemption: PreemptionCoordinator) -> Path:
    """One run, or the rest of one, on this process's part; returns the run's folder.

    Raises Preempted on every process, with everything saved, if the run is to end early.
    """
    config, world = lifecycle.config, lifecycle.world
    notes, dtype = check_device(config, world), base_dtype(config, world)
    with preemption.apart() as look:
        trusted = config.model.trust_remote_code
        folder = resolve_model(config.model.name_or_path, config.model.revision, trust_remote_code=trusted)
        model_config = read_model_config(folder, trust_remote_code=trusted)
        attention_for(config.model.attn_implementation, model_config, dtype, world.device)
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
        base_facts = check_support(config, folder, tokenizer, dtype)
        data = build_data(config.data, tokenizer, look)
        check_tokens(data, base_facts.spare_tokens)
        lengths = position_notes(data, folder, trust_remote_code=trusted)
    baseline = run_on_rank0(lambda: _baseline(config, data), world)
    # Opened only now, so that a mistake in the tasks does not use up the run's name.
    logger = lifecycle.open()
    logger.notes([*check_plan(config, world.size).notes, *notes, *base_facts.notes])
    logger.data(data)
    logger.notes(lengths)

    base = base_identity(config, folder, world)
    if not lifecycle.resume_point.goes_on:
        logger.measured_on({"recipe": decisive(plain_config(config)), "base": base, "rows": data.digests})
    loader = train_loader(config, data, world)
    logger.notes(unseen_tasks(config, data, loader))
    logger.notes(check_memory(config, folder, world, first_lengths(loader, data.train)))
    checkpoint = _checkpoint(lifecycle, base, data, loader)
    train_step, steps = _build(lifecycle, logger, data, loader, folder, watchdog, preemption, new=checkpoint is None)
    packing = check_packing(train_step.engine, world, config.train.per_device_train_batch_size, data.longest)
    step_metrics = StepMetrics(train_step)
    checkpoints = RunCheckpoints(logger.config, logger, train_step, loader, step_metrics, base, data.digests)
    preemption.background = checkpoints.saver
    best_by = f"{config.train.best_metric} {config.train.best_baseline or ''}".strip()
    lifecycle.state = (
        LoopState(best=Best(by=best_by)) if checkpoint is None else checkpoints.restore(checkpoint, best_by)
    )
    if checkpoint is not None:
        logger.resumed(lifecycle.state.step, checkpoint, validated=lifecycle.state.validated)
    elif lifecycle.resume_point.folder is not None:
        logger.resumed(0, None)
    measure = _Measurement(config, data, train_step, preemption, packing)
    try:
        baseline = _measure_base(config, logger, measure, baseline)
        _train(
            lifecycle,
            logger,
            measure,
            baseline,
            _Parts(train_step, loader, step_metrics, checkpoints),
            steps,
            preemption,
        )
    except (Preempted, NonFiniteError):
        checkpoints.complete()
        raise
    watchdog.mark_phase("finishing the report")
    logger.finish()
    return logger.folder


@dataclass(frozen=True)
class _Parts:
    train_step: TrainStep
    loader: TrainLoader
    step_metrics: StepMetrics
    checkpoints: RunCheckpoints


def _train(
    lifecycle: RunLifecycle,
    logger: RunLogger,
    measure: "_Measurement",
    baseline: Tasks | None,
    parts: _Parts,
    steps: int,
    preemption: PreemptionCoordinator,
) -> None:
    """The steps that are left, the adapter, and what it is worth."""
    train = lifecycle.config.train
    settings = LoopSettings(
        max_steps=steps,
        steps_per_epoch=parts.loader.steps_per_epoch,
        logging_steps=train.logging_steps,
        eval_steps=train.eval_steps,
        save_steps=train.save_steps,
        stop_after_steps=train.stop_after_steps,
    )
    actions = Actions(
        log=logger.record,
        validate=lambda step: logger.validation(step, measure("validation"), train.best_metric, baseline),
        save=parts.checkpoints.save,
    )
    train_loop(parts.train_step, parts.loader, parts.step_metrics, settings, lifecycle.state, actions, preemption)
    parts.train_step.watchdog.mark_phase("saving the adapter")
    logger.adapter(parts.train_step.engine.module, "adapter")
    if lifecycle.config.evaluation.tuned:
        logger.evaluation("tuned", measure("tuned"))
    parts.checkpoints.complete()


def _checkpoint(
    lifecycle: RunLifecycle, base: Mapping[str, str | None], data: PreparedData, loader: TrainLoader
) -> Checkpoint | None:
    """What the run goes on from, checked before any weight is loaded; `loader` then begins where it was saved."""
    if lifecycle.resume_point.checkpoint is None:
        return None
    checkpoint = open_checkpoint(Path(lifecycle.resume_point.checkpoint), lifecycle.world)
    check_base(checkpoint.manifest, base)
    check_data(checkpoint.manifest, data.digests)
    loader.load_state_dict(checkpoint.manifest.state["loader"])
    return checkpoint


def _build(
    lifecycle: RunLifecycle,
    logger: RunLogger,
    data: PreparedData,
    loader: TrainLoader,
    folder: Path,
    watchdog: Watchdog,
    preemption: PreemptionCoordinator,
    *,
    new: bool,
) -> tuple[TrainStep, int]:
    """Base, adapters and engine, and the number of optimizer steps; `new` adapters have their initial values."""
    config, world = lifecycle.config, lifecycle.world
    watchdog.mark_phase("loading the base model")
    settings = engine_config(config, world)
    groups = create_expert_groups(config.parallel.ep_size, config.parallel.timeout_seconds)
    model = base_model(config, folder, world, settings, preemption.check)
    report, all_to_all = add_adapters(model, config, settings, groups, preemption.check, init_weights=new)
    logger.injection(report)
    steps = total_steps(config, loader)
    watchdog.mark_phase("starting DeepSpeed")
    engine = build_engine(
        model,
        settings,
        optimizer_settings(config, steps),
        zero_stage=config.parallel.zero_stage,
        timeout_seconds=config.parallel.timeout_seconds,
        expert_groups=groups,
    )
    logger.placement(str(model.dtype), resident_bytes(model), steps, loader.steps_per_epoch)
    return new_train_step(config, data, engine, world, all_to_all, watchdog), steps


def _baseline(config: RunConfig, data: PreparedData) -> Tasks | None:
    """What best_metric compares with, if that is a file. Raises ConfigError for what cannot be validated."""
    if config.train.eval_steps is None:
        return None
    measured = [task for task, rows in data.evaluation["validation"].items() if rows]
    if not measured:
        raise ConfigError(f"train.eval_steps={config.train.eval_steps}: no task has validation rows to evaluate on")
    if config.train.best_baseline is None:
        return None
    return read_baseline(Path(config.train.best_baseline), measured)


def _measure_base(
    config: RunConfig, logger: RunLogger, measure: "_Measurement", baseline: Tasks | None
) -> Tasks | None:
    """Measure the untouched model, unless a start before this one has; the baseline of best_metric."""
    if config.evaluation.base and "base" not in logger.evaluations:
        logger.evaluation("base", measure("base", use_adapter=False))
    if config.train.eval_steps is None or config.train.best_metric != "worst_drop" or baseline is not None:
        return baseline
    tasks: Tasks = logger.kept("baseline.json", lambda: measure("validation", use_adapter=False))["tasks"]
    return tasks


class _Measurement:
    """Measures the engine on a split of the tasks."""

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        train_step: TrainStep,
        preemption: PreemptionCoordinator,
        packing: Packing,
    ) -> None:
        self.config, self.data, self.train_step, self.preemption = config, data, train_step, preemption
        self.packing = packing

    def __call__(self, what: str, use_adapter: bool = True) -> dict[str, Any]:
        self.train_step.watchdog.mark_phase(f"evaluation ({what})")
        return evaluate_tasks(
            self.train_step.engine,
            self.data.evaluation["validation" if what == "validation" else self.config.evaluation.split],
            self.train_step.world,
            batch_tokens=self.config.evaluation.batch_tokens,
            title=f"evaluating ({what})",
            packing=self.packing,
            use_adapter=use_adapter,
            between=self.preemption.check,
        )


if __name__ == "__main__":
    sys.exit(main())
