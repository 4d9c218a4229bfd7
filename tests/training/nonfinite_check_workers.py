"""Steps on two real processes in which a number stops being finite, by forward on one rank or by backward on one."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.distributed.expert_groups import create_expert_groups
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.zero3 import gathered_adapter_state
from malora_dist.errors import TrainingError
from malora_dist.training.balance_loss import BalanceSettings
from malora_dist.training.deepspeed_engine import OptimizerSettings, build_engine
from malora_dist.training.train_step import StepSettings, TrainStep
from tests.training.workers import build_model

TASKS = ["a", "b", "c"]
ACCUMULATION, TOKEN = 2, 95


def deepspeed_settings(zero_stage: int, offload: bool = False) -> dict[str, Any]:
    offloaded = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    return {
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": zero_stage,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
            **offloaded,
        },
    }


def new_train_step(world: World, folder: str, case: dict[str, Any], *, total_steps: int = 6) -> TrainStep:
    """A TrainStep over the tiny model: linear schedule of `total_steps` with two steps of warm-up, dropout on."""
    stage = case["zero_stage"]
    settings = deepspeed_settings(stage, case.get("offload", False))
    schedule = OptimizerSettings(
        learning_rate=1e-3,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        lr_scheduler_type="linear",
        warmup_steps=2,
        total_steps=total_steps,
    )
    groups = create_expert_groups(case.get("ep_size", 1), 60)
    model = build_model(folder, case, world, settings, groups)
    engine = build_engine(model, settings, schedule, zero_stage=stage, timeout_seconds=60, expert_groups=groups)
    balance = BalanceSettings(0.01, "mean", "global")
    step = StepSettings(
        task_names=TASKS, balance=balance, normalization="token", zero_stage=stage, max_grad_norm=1.0, seed=7
    )
    return TrainStep(engine, world, step)


def batches(world: World, step: int) -> list[MicroBatch]:
    """One sample a micro-batch, of unequal lengths: task a with TOKEN and b on rank 0, b and c on rank 1."""
    draw = np.random.default_rng([step, world.rank])
    found = []
    for micro, task in enumerate([[0, 1], [1, 2]][world.rank]):
        ids = draw.integers(0, TOKEN, 6 + 5 * micro + world.rank).astype(np.int32)
        ids[1] = TOKEN if task == 0 else ids[1]
        sample = Sample(100 * step + 10 * world.rank + micro, task, ids, 3)
        found.append(collate([sample]).to(world.device))
    return found


def break_forward(model: nn.Module) -> None:
    """The embedding of TOKEN becomes NaN, as if its row were; the head, tied to it, stays whole."""

    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == TOKEN)[..., None], torch.nan)

    model.get_submodule("model.embed_tokens").register_forward_hook(hook)


def break_weight(model: nn.Module) -> None:
    """One base weight becomes NaN: the layer's output has it for every token."""
    import deepspeed

    weight = dict(mixture_layers(model))["model.layers.1.self_attn.v_proj"].base_layer.weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=hasattr(weight, "ds_id")):
        if weight.numel():
            weight.data[3, 4] = torch.nan


def break_backward(model: nn.Module, times: int = 10**9) -> None:
    """The gradient of one layer's output becomes infinite, the first `times` times."""
    left = [times]

    def infinite(gradient: Tensor) -> Tensor | None:
        left[0] -= 1
        return gradient * torch.inf if left[0] >= 0 else None

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(infinite)

    dict(mixture_layers(model))["model.layers.1.mlp.gate_proj"].register_forward_hook(hook)


def break_first_backward(model: nn.Module) -> None:
    """Only in the first micro-batch of the step."""
    break_backward(model, times=1)


FAULTS = {
    "forward": break_forward,
    "weight": break_weight,
    "backward": break_backward,
    "first backward": break_first_backward,
}
ON_ONE_RANK = ("backward", "first backward")


def failing_steps(world: World, folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: failing_step(world, folder, case) for name, case in cases.items()}


def failing_step(world: World, folder: str, case: dict[str, Any]) -> dict[str, Any]:
    """One good step, then the fault, then a step that must fail."""
    train_step = new_train_step(world, folder, case)
    model = train_step.engine.module
    start = dict(gathered_adapter_state(model))
    train_step.run(1, batches(world, 1))  # at learning rate 0, the first of the warm-up
    train_step.run(2, batches(world, 2))
    before = dict(gathered_adapter_state(model))
    if case["fault"] not in ON_ONE_RANK or world.rank == 1:
        FAULTS[case["fault"]](model)
    error = ""
    try:
        train_step.run(3, batches(world, 3))
    except TrainingError as caught:
        error = str(caught)
    after = dict(gathered_adapter_state(model))
    return {
        "error": error,
        "moved by the good step": not all(torch.equal(start[name], before[name]) for name in start),
        "moved by the bad step": not all(torch.equal(before[name], after[name]) for name in before),
        "steps": train_step.engine.global_steps,
    }
