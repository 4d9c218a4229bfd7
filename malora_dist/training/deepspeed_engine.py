"""From a model with adapters to a DeepSpeed engine. Holds the only `deepspeed.initialize`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.process_groups import set_timeouts
from malora_dist.distributed.zero012 import check_reduction, parameter_groups, showing_experts
from malora_dist.distributed.zero3 import check_partitioning
from malora_dist.optimizers.registry import DEFAULT, optimizer_spec

# In a parameter group, the multiple of the run's learning rate that it has.
RATIO = "lr_ratio"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer and schedule, in the words of transformers.

    lr_ratios: by factor (gate, shared_A, P, A, B), its learning rate as a multiple of `learning_rate`, where not 1.
    """

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    lr_scheduler_type: str
    warmup_steps: int
    total_steps: int
    optim: str = DEFAULT
    lr_ratios: Mapping[str, float] = field(default_factory=dict)


def build_engine(
    model: nn.Module,
    deepspeed_config: dict[str, Any],
    settings: OptimizerSettings | None,
    *,
    zero_stage: int,
    timeout_seconds: float,
    expert_groups: ExpertGroups | None = None,
) -> Any:
    """Build the DeepSpeed engine over `model`; without `settings` one that only computes forward.

    The engine runs in fp32: adapters, their gradients and, but for 8-bit optimizers, the optimizer's state are fp32 at
    every ZeRO stage, while the frozen base keeps its own dtype. Raises TopologyError if DeepSpeed spread a parameter
    over another group than it should, or would add gradients of experts up over another one. At stage 0 the caller
    clips (`clip_gradients`).
    """
    import deepspeed

    if settings is None and zero_stage in (1, 2):
        # These stages split what an optimizer holds, and DeepSpeed refuses them without one.
        zero_stage = 0
        deepspeed_config = {**deepspeed_config, "zero_optimization": {"stage": 0}}
    if zero_stage == 0:
        deepspeed_config = {**deepspeed_config, "gradient_clipping": 0.0}
    trained = [(name, parameter) for name, parameter in adapter_parameters(model) if parameter.requires_grad]
    groups_below_3 = expert_groups if zero_stage < 3 else None
    with showing_experts(model) if groups_below_3 is not None else nullcontext():
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=None if settings is None else _optimizer(_groups(trained, groups_below_3, settings), settings),
            lr_scheduler=None if settings is None else _schedule(settings),
            config=deepspeed_config,
        )
    set_timeouts(timeout_seconds)
    check_partitioning(engine.module, zero_stage, expert_groups)
    if groups_below_3 is not None and settings is not None:
        check_reduction(engine, zero_stage, groups_below_3)
    return engine


def _groups(
    trained: Sequence[tuple[str, nn.Parameter]], expert_groups: ExpertGroups | None, settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, none of them empty, which DeepSpeed would drop.

    Parameters of another learning rate than `settings.learning_rate` are groups of their own, which hold the ratio.
    """
    by_ratio: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained:
        ratio = settings.lr_ratios.get(name.rpartition(".")[2], 1.0)
        by_ratio.setdefault(ratio, []).append(parameter)
    groups = []
    for ratio, parameters in by_ratio.items():
        rate = {} if ratio == 1 else {"lr": settings.learning_rate * ratio, RATIO: ratio}
        groups += [group | rate for group in parameter_groups(parameters, expert_groups)]
    return groups


def base_learning_rate(optimizer: Any) -> float:
    """Return the present learning rate of parameters whose ratio is 1, from an engine's optimizer."""
    group = min(optimizer.param_groups, key=lambda group: RATIO in group)
    return float(group["lr"] / group.get(RATIO, 1.0))


def _optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    return optimizer_spec(settings.optim).build(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def _schedule(settings: OptimizerSettings) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    from transformers import get_scheduler

    return lambda optimizer: get_scheduler(
        settings.lr_scheduler_type, optimizer, settings.warmup_steps, settings.total_steps
    )
