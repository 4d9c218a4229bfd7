"""From a recipe to the parts of a run: data, adapters, engine, steps."""

import math
from typing import Any

from torch import nn

from malora_dist.adapters.inject import InjectionReport, inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.config import RunConfig
from malora_dist.config.deepspeed import deepspeed_config
from malora_dist.config.summary import adapter_spec
from malora_dist.data.build import PreparedData
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.all_to_all import AllToAll
from malora_dist.distributed.deepspeed_names import check_names
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.expert_parallel import connect_experts, keep_local_experts
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.zero3 import gathered, partition_at_once
from malora_dist.training.balance_loss import BalanceSettings
from malora_dist.training.deepspeed_engine import OptimizerSettings
from malora_dist.training.loop import LoopSettings
from malora_dist.training.run_context import RunContext
from malora_dist.training.train_step import StepSettings, TrainStep


def engine_config(config: RunConfig, world: World) -> dict[str, Any]:
    """Return DeepSpeed's configuration of this run. Raises ConfigError if the installed version cannot run it."""
    check_names(f"parallel.zero_stage={config.parallel.zero_stage}")
    result = deepspeed_config(config, world.size)
    # DeepSpeed would replace F.linear for the whole process by one that breaks non-reentrant recomputation.
    result["zero_optimization"].setdefault("memory_efficient_linear", False)
    # Its clock, which nothing here reads, waits for the device before and after every micro-batch.
    result["timers"] = {"throughput": {"enabled": False}}
    return result


def add_adapters(
    model: nn.Module,
    context: RunContext,
    deepspeed_settings: dict[str, Any],
    groups: ExpertGroups | None,
    init_weights: bool = True,
) -> tuple[InjectionReport, AllToAll | None]:
    """Inject the recipe's mixture; with expert groups each process keeps its own experts.

    Every process draws the same whole layer before it keeps its part, and does so before the next layer is drawn: step
    0 does not depend on the topology, and no process ever holds more than one whole layer at ZeRO-3. The context is
    polled at each layer.

    Args:
        model: the base.
        context: of the run.
        deepspeed_settings: those of `engine_config`.
        groups: the processes that share one set of experts; None without expert parallelism.
        init_weights: whether to draw initial values; not where a checkpoint will be restored.

    Returns:
        What was adapted, and what exchanges tokens between the processes of a group.
    """
    config = context.config
    adapter = config.adapter
    partition = partition_at_once(deepspeed_settings, share=None) if config.parallel.zero_stage == 3 else None

    def place(layer: MixtureLinear) -> None:
        context.poll()
        if groups is not None:
            keep_local_experts(layer, groups)
        if partition is not None:
            partition([parameter for _, parameter in layer.factors()])

    report = inject_adapters(
        model,
        adapter_spec(config),
        adapter.target_modules,
        lora_dropout=adapter.lora_dropout,
        computation=adapter.computation,
        fuse_projections=adapter.fuse_projections,
        seed=config.train.seed,
        init_weights=init_weights,
        place=place,
        whole=gathered,
    )
    return report, None if groups is None else connect_experts(model, groups)


def optimizer_settings(config: RunConfig, total_steps: int) -> OptimizerSettings:
    """Return optimizer and schedule; warm-up is rounded up to whole steps, as transformers does."""
    train = config.train
    return OptimizerSettings(
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=math.ceil(total_steps * train.warmup_ratio),
        total_steps=total_steps,
        optim=train.optim,
        lr_ratios=train.lr_ratios.by_factor(),
    )


def train_loader(config: RunConfig, data: PreparedData, world: World) -> TrainLoader:
    """Return this process's micro-batches of the training data."""
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


def total_steps(config: RunConfig, loader: TrainLoader) -> int:
    """Return the optimizer steps of the whole run."""
    return config.train.max_steps or loader.steps_for(config.train.num_train_epochs or 0)


def loop_settings(config: RunConfig, loader: TrainLoader) -> LoopSettings:
    """Return the length of the run and its intervals."""
    train = config.train
    return LoopSettings(
        max_steps=total_steps(config, loader),
        steps_per_epoch=loader.steps_per_epoch,
        logging_steps=train.logging_steps,
        eval_steps=train.eval_steps,
        save_steps=train.save_steps,
        stop_after_steps=train.stop_after_steps,
    )


def unseen_tasks(config: RunConfig, data: PreparedData, loader: TrainLoader) -> list[str]:
    """Return a note on each task of which the run draws no sample."""
    steps = total_steps(config, loader)
    return [
        f"task {data.task_names[task]}: none of its {data.train_sizes[task]} samples is drawn in the {steps} steps of "
        f"this run, its share of the mixture is {data.shares[task]:.2g}; see data.mixture and the task's weight"
        for task in loader.unseen(steps)
    ]


def balance_settings(config: RunConfig, total_steps: int) -> BalanceSettings:
    """Return the losses of routers; the schedule's end is rounded up to whole steps."""
    adapter = config.adapter
    return BalanceSettings(
        adapter.router_aux_loss_coef,
        adapter.router_aux_loss_reduction,
        adapter.balance_scope,
        schedule=adapter.router_aux_loss_schedule,
        last_step=math.ceil(total_steps * adapter.router_aux_loss_ratio),
        z_coefficient=adapter.router_z_loss_coef,
    )


def new_train_step(
    context: RunContext, data: PreparedData, engine: Any, all_to_all: AllToAll | None, total_steps: int
) -> TrainStep:
    """Return what runs the recipe's optimizer steps, `total_steps` in the whole run, on `engine`."""
    train = context.config.train
    settings = StepSettings(
        task_names=data.task_names,
        balance=balance_settings(context.config, total_steps),
        normalization=train.loss_normalization,
        zero_stage=context.config.parallel.zero_stage,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        task_conflict=context.config.adapter.task_conflict,
    )
    return TrainStep(engine, context.world, settings, all_to_all=all_to_all, watchdog=context.watchdog)
