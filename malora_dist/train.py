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
from malora_dist.engine.base import base_model
from malora_dist.engine.build import build_engine
from malora_dist.engine.evaluation import evaluate_tasks
from malora_dist.engine.loop import LoopSettings, train_loop
from malora_dist.engine.outputs import RunOutputs
from malora_dist.engine.position import Position, watched
from malora_dist.engine.process import run_as_process
from malora_dist.engine.setup import add_adapters, engine_config, new_stepper, optimizer_settings, train_loader
from malora_dist.engine.step import Stepper
from malora_dist.model import load_tokenizer
from malora_dist.parallel.expert_groups import create_expert_groups
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
    position = Position(world.rank)
    with watched(position, config.parallel.timeout_seconds):
        run(config, world, position)


def run(config: RunConfig, world: World, position: Position) -> Path:
    """One run on this process's part, which keeps `position` up to date; returns the run's folder."""
    plan = check_plan(config, world.size)
    folder = resolve_model(config.model.name_or_path, config.model.revision)
    data = build_data(config.data, load_tokenizer(folder))
    # Claimed only now, so that a mistake in the tasks does not use up the run's name.
    outputs = RunOutputs.claim(config, world)
    outputs.notes(plan.notes)
    outputs.data(data)

    position.enter("loading the base model")
    settings = engine_config(config, world)
    groups = create_expert_groups(config.parallel.ep_size, config.parallel.timeout_seconds)
    model = base_model(config, folder, world, settings)
    report, wire = add_adapters(model, config, settings, groups)
    outputs.injection(report)
    loader = train_loader(config, data, world)
    steps = config.train.max_steps or loader.steps_for(config.train.num_train_epochs or 0)
    position.enter("starting DeepSpeed")
    engine = build_engine(
        model,
        settings,
        optimizer_settings(config, steps),
        zero_stage=config.parallel.zero_stage,
        timeout_seconds=config.parallel.timeout_seconds,
        expert_groups=groups,
    )
    outputs.placement(str(model.dtype), resident_bytes(model), steps, loader.steps_per_epoch)

    stepper = new_stepper(config, data, engine, world, wire, position)
    if config.evaluation.base:
        outputs.evaluation("base", _evaluate(config, data, stepper, "base", use_adapter=False))
    train_loop(
        stepper,
        loader,
        _loop_settings(config, steps, loader.steps_per_epoch),
        log=outputs.record,
        evaluate=lambda step: outputs.validation(step, _evaluate(config, data, stepper, "validation")),
        save=lambda step: _save(outputs, stepper, f"adapter-step-{step:06d}"),
    )
    _save(outputs, stepper, "adapter")
    if config.evaluation.tuned:
        outputs.evaluation("tuned", _evaluate(config, data, stepper, "tuned"))
    position.enter("finishing the report")
    outputs.finish()
    return outputs.folder


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
    config: RunConfig, data: PreparedData, stepper: Stepper, what: str, use_adapter: bool = True
) -> dict[str, Any]:
    stepper.position.enter(f"evaluation ({what})")
    split = "validation" if what == "validation" else config.evaluation.split
    return evaluate_tasks(
        stepper.engine,
        data.evaluation[split],
        stepper.world,
        batch_tokens=config.evaluation.batch_tokens,
        share_prompt=config.model.attn_implementation == "sdpa",
        title=f"evaluating ({what})",
        use_adapter=use_adapter,
    )


def _save(outputs: RunOutputs, stepper: Stepper, name: str) -> None:
    stepper.position.enter(f"saving {name}")
    outputs.adapter(stepper.engine.module, name)


if __name__ == "__main__":
    sys.exit(main())
