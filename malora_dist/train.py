"""`deepspeed --module malora_dist.train recipe.yaml [--section.key value ...]`: a run from its recipe to its report.

Read `run` as the table of contents; every line is a module of its own. The same file runs under `deepspeed`,
`torchrun`, `srun` and plain `python`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from malora_dist.config import RunConfig, load_config, split_arguments
from malora_dist.config.matrix import check_plan
from malora_dist.data.build import PreparedData, build_data
from malora_dist.data.loader import TrainLoader
from malora_dist.engine.build import build_engine
from malora_dist.engine.evaluation import evaluate_tasks
from malora_dist.engine.forward import BalanceSettings
from malora_dist.engine.loop import LoopSettings, train_loop
from malora_dist.engine.outputs import RunOutputs
from malora_dist.engine.process import run_as_process
from malora_dist.engine.setup import add_adapters, base_model, engine_config, optimizer_settings
from malora_dist.engine.step import Stepper
from malora_dist.model import load_tokenizer
from malora_dist.parallel.groups import World
from malora_dist.parallel.zero import resident_bytes
from malora_dist.source import resolve_model
from malora_dist.trackers import check_trackers


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the recipe says. Returns the exit code: 0, 1 for a failed run, 2 for a mistake in the recipe."""
    return run_as_process(lambda: _start(sys.argv[1:] if arguments is None else arguments))


def _start(arguments: Sequence[str]) -> None:
    from malora_dist.parallel.groups import start_processes

    recipe, overrides = split_arguments(arguments)
    config = load_config(recipe, overrides)
    check_trackers(config.train.report_to)
    world = start_processes(config.parallel.timeout_seconds)
    run(config, world)


def run(config: RunConfig, world: World) -> Path:
    """One run on this process's part; returns the run's folder."""
    plan = check_plan(config, world.size)
    folder = resolve_model(config.model.name_or_path, config.model.revision)
    data = build_data(config.data, load_tokenizer(folder))
    # Claimed only now, so that a mistake in the tasks does not use up the run's name.
    outputs = RunOutputs.claim(config, world)
    outputs.notes(plan.notes)
    outputs.data(data)

    settings = engine_config(config, world)
    model = base_model(config, folder, world, settings)
    outputs.injection(add_adapters(model, config))
    loader = _loader(config, data, world)
    steps = config.train.max_steps or loader.steps_for(config.train.num_train_epochs or 0)
    engine = build_engine(
        model,
        settings,
        optimizer_settings(config, steps),
        zero_stage=config.parallel.zero_stage,
        timeout_seconds=config.parallel.timeout_seconds,
    )
    outputs.placement(str(model.dtype), resident_bytes(model), steps, loader.steps_per_epoch)

    if config.evaluation.base:
        outputs.evaluation("base", _evaluate(config, data, engine, world, "base", use_adapter=False))
    train_loop(
        _stepper(config, data, engine, world),
        loader,
        _loop_settings(config, steps, loader.steps_per_epoch),
        log=outputs.record,
        evaluate=lambda step: outputs.validation(step, _evaluate(config, data, engine, world, "validation")),
        save=lambda step: outputs.adapter(engine.module, f"adapter-step-{step:06d}"),
    )
    outputs.adapter(engine.module, "adapter")
    if config.evaluation.tuned:
        outputs.evaluation("tuned", _evaluate(config, data, engine, world, "tuned"))
    outputs.finish()
    return outputs.folder


def _loader(config: RunConfig, data: PreparedData, world: World) -> TrainLoader:
    return TrainLoader(
        data.train,
        task_sizes=data.train_sizes,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.per_device_train_batch_size,
        shares=data.shares,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
        fingerprint=data.fingerprint,
    )


def _stepper(config: RunConfig, data: PreparedData, engine: Any, world: World) -> Stepper:
    adapter = config.adapter
    return Stepper(
        engine,
        world,
        task_names=data.task_names,
        balance=BalanceSettings(adapter.router_aux_loss_coef, adapter.router_aux_loss_reduction, adapter.balance_scope),
        normalization=config.train.loss_normalization,
        zero_stage=config.parallel.zero_stage,
        seed=config.train.seed,
    )


def _loop_settings(config: RunConfig, steps: int, steps_per_epoch: float) -> LoopSettings:
    train = config.train
    return LoopSettings(
        max_steps=steps,
        steps_per_epoch=steps_per_epoch,
        logging_steps=train.logging_steps,
        eval_steps=train.eval_steps,
        save_steps=train.save_steps,
        stop_after_steps=train.stop_after_steps,
    )


def _evaluate(
    config: RunConfig, data: PreparedData, engine: Any, world: World, what: str, use_adapter: bool = True
) -> dict[str, Any]:
    split = "validation" if what == "validation" else config.evaluation.split
    return evaluate_tasks(
        engine,
        data.evaluation[split],
        world,
        batch_tokens=config.evaluation.batch_tokens,
        share_prompt=config.model.attn_implementation == "sdpa",
        title=f"evaluating ({what})",
        use_adapter=use_adapter,
    )


if __name__ == "__main__":
    sys.exit(main())
