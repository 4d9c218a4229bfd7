"""What the processes of the engine's tests do; `one_process` is what they are compared with."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_grad, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import mixture_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.distributed.expert_groups import ExpertGroups, create_expert_groups
from malora_dist.distributed.expert_parallel import connect_experts, keep_local_experts
from malora_dist.distributed.process_groups import World, replicate
from malora_dist.distributed.zero3 import (
    gather_experts,
    gathered,
    gathered_adapter_state,
    partition_at_once,
    resident_bytes,
)
from malora_dist.models.load import load_base_model, stay
from malora_dist.models.loss_head import install_loss_head
from malora_dist.training import train_step as step_module
from malora_dist.training.balance_loss import BalanceSettings
from malora_dist.training.deepspeed_engine import OptimizerSettings, build_engine
from malora_dist.training.train_step import StepResult, StepSettings, TrainStep
from tests.multiprocess import group_timeouts
from tests.tiny_models import tiny_config

STEPS, ACCUMULATION = 5, 2
LEARNING_RATE, MAX_NORM, COEFFICIENT, SEED = 1e-3, 0.1, 0.3, 7
# With Adam's usual epsilon, the rounding of gradients near 0 would grow a thousandfold in the weights.
EPSILON = 1e-5
# Prompt and response lengths of the samples of one step: counts from 0 to 60, so that one of two ranks has no
# supervised token in the first micro-batch and the ranks' token counts differ widely in the second.
LENGTHS = [(9, 0), (5, 0), (7, 60), (4, 1), (6, 1), (11, 0), (3, 30), (8, 2)]


def make_model(folder: Path) -> None:
    """A tiny Llama with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(tiny_config(**sizes, tie_word_embeddings=True))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.save_pretrained(folder)


def step_samples(step: int, lengths: Sequence[Sequence[int]] = LENGTHS) -> list[Sample]:
    """The global batch of a step, over all ranks and micro-batches."""
    draw = np.random.default_rng(step)
    return [
        Sample(100 * step + i, i % 3, draw.integers(0, 96, prompt + response).astype(np.int32), prompt)
        for i, (prompt, response) in enumerate(lengths)
    ]


def build_model(
    folder: str,
    case: dict[str, Any],
    world: World | None,
    config: dict[str, Any],
    groups: ExpertGroups | None = None,
) -> nn.Module:
    place = stay if world is None else partition_at_once(config) if case["zero_stage"] == 3 else replicate
    model = load_base_model(
        Path(folder),
        dtype=getattr(torch, case.get("dtype", "float32")),
        load_in_4bit=case.get("load_in_4bit", False),
        double_quant=case.get("double_quant", False),
        device="cpu" if world is None else world.device,
        reader=world is None or world.is_main,
        place=place,
    )
    if world is not None:
        assert install_loss_head(model)
    if case.get("gradient_checkpointing") and world is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    shape = {"num_experts": 4, "top_k": 2, "r": 3, "shared_r": 6} | case.get("shape", {})
    spec = mixture_spec(case.get("method", "malora"), **shape)
    partition = partition_at_once(config, share=None) if world is not None and case["zero_stage"] == 3 else None

    def place_adapters(layer: MixtureLinear) -> None:
        if case.get("tied_router"):
            # Equal probabilities: every token goes to experts 0 and 1, so to one rank, and nobody visits the others.
            layer.input_projection.gate.data.zero_()
            layer.input_projection.gate.requires_grad_(False)
        if groups is not None:
            keep_local_experts(layer, groups)
        if partition is not None and not case.get("whole_adapters"):
            partition([parameter for _, parameter in layer.factors()])

    computation = case.get("computation", "auto")
    inject_adapters(
        model,
        spec,
        lora_dropout=case.get("dropout", 0.1),
        computation=computation,
        fuse_projections=world is not None and case.get("fuse_projections", True),
        seed=SEED,
        place=place_adapters,
        whole=gathered,
    )
    if groups is not None:
        connect_experts(model, groups)
    return model


def new_train_step(world: World, folder: str, case: dict[str, Any], kind: type[TrainStep] | None = None) -> Any:
    """The case's model, adapters and engine, before the first step; a RecordingTrainStep, or of another kind."""
    accumulation, stage = case.get("accumulation", ACCUMULATION), case["zero_stage"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": len(LENGTHS) // accumulation // world.size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # As `training.setup.engine_config`: it would wait for the device.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
    }
    if stage == 3 and not case.get("default_persistence"):
        # A tiny model's parameters would otherwise all stay whole on every rank.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if case.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    groups = create_expert_groups(case.get("ep_size", 1), 60)
    settings = OptimizerSettings(
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        epsilon=EPSILON,
        lr_scheduler_type=case.get("lr_scheduler_type", "constant"),
        warmup_steps=0,
        total_steps=STEPS,
        optim=case.get("optim", "adamw_torch"),
        lr_ratios=case.get("lr_ratios", {}),
    )
    model = build_model(folder, case, world, config, groups)
    return (kind or RecordingTrainStep)(
        build_engine(model, config, settings, zero_stage=stage, timeout_seconds=60, expert_groups=groups),
        world,
        StepSettings(
            task_names=["a", "b", "c"],
            balance=BalanceSettings(COEFFICIENT, "mean", "global", **case.get("balance", {})),
            normalization=case.get("normalization", "token"),
            zero_stage=stage,
            max_grad_norm=MAX_NORM,
            seed=SEED,
            task_conflict=case.get("task_conflict", "none"),
        ),
    )


def run_steps(train_step: TrainStep, case: dict[str, Any], steps: Iterable[int]) -> list[StepResult]:
    """Those steps on this process's share of their batches."""
    results = []
    for step in steps:
        samples = step_samples(step, case.get("lengths", LENGTHS))
        results.append(train_step.run(step, _share(samples, train_step.world, case.get("accumulation", ACCUMULATION))))
        if case.get("evaluation_between"):
            evaluate_between(train_step.engine, step)
    return results


def train_case(world: World, folder: str, output: str, case: dict[str, Any]) -> dict[str, Any]:
    """Five steps of one case; weights, gradients and moments go to a file."""
    train_step = new_train_step(world, folder, case)
    model = train_step.engine.module
    kept = (lambda _: nullcontext()) if case.get("no_copies") else step_module.kept_weight_copies
    with mock.patch.object(step_module, "kept_weight_copies", kept):
        results = run_steps(train_step, case, range(1, STEPS + 1))
    tensors = dict(gathered_adapter_state(model)) | dict(gathered_moments(train_step))
    tensors |= {f"gradient.{step}.{name}": g for step, name, g in train_step.gradients}
    if world.is_main:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)
    return {
        "losses": [result.loss for result in results],
        "aux_losses": [result.aux_loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "task_losses": [result.task_loss_sums for result in results],
        "resident": resident_bytes(model),
        "whole": {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()},
        "parts": {name: p.ds_tensor.numel() for name, p in model.named_parameters() if hasattr(p, "ds_tensor")},
        "timeouts": group_timeouts(),
    }


def train_cases(world: World, folder: str, output: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All cases one after another in the same processes."""
    return {name: train_case(world, folder, f"{output}/{name}.safetensors", case) for name, case in cases.items()}


def _share(samples: Sequence[Sample], world: World, accumulation: int) -> list[Any]:
    size = len(samples) // accumulation // world.size
    first = [(micro * world.size + world.rank) * size for micro in range(accumulation)]
    return [collate(samples[start : start + size]).to(world.device) for start in first]


class RecordingTrainStep(TrainStep):
    """Keeps every gradient of every step as it is before clipping: (step, name, whole tensor)."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.gradients: list[tuple[int, str, Tensor]] = []

    def _check(self, *arguments: Any) -> Any:
        totals = super()._check(*arguments)
        number = arguments[0]
        for name, parameter in adapter_parameters(self.engine.module):
            if parameter.requires_grad:
                self.gradients.append(
                    (number, name, gather_experts(parameter, safe_get_full_grad(parameter)).to("cpu", copy=True))
                )
        return totals


def link_optimizer_state(optimizer: Any) -> None:
    """Link the optimizer's state at stages 1 and 2, after a step: `safe_get_full_optimizer_state` finds all of it.

    DeepSpeed links it once, when the first group of parameters has stepped; later groups stay without.
    """
    for parameters, part in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, part, optimizer.optimizer.state)


def gathered_moments(train_step: TrainStep) -> Iterator[tuple[str, Tensor]]:
    """Both moments of every trained adapter tensor, whole: `exp_avg.<name>`, `exp_avg_sq.<name>`."""
    optimizer = train_step.engine.optimizer
    if train_step.settings.zero_stage in (1, 2):
        link_optimizer_state(optimizer)
    for name, parameter in adapter_parameters(train_step.engine.module):
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                if train_step.settings.zero_stage == 0:
                    moment = optimizer.state[parameter][key]
                else:
                    moment = safe_get_full_optimizer_state(parameter, key)
                yield f"{key}.{name}", gather_experts(parameter, moment).to("cpu", copy=True)


def evaluate_between(engine: Any, step: int) -> None:
    """A forward without gradients, other lengths on every rank, as evaluation makes them; then back to training."""
    engine.eval()
    ids = torch.arange(3 + 2 * dist.get_rank() + step, device=engine.device)[None]
    with torch.no_grad():
        engine(input_ids=ids, use_cache=False)
    engine.train()
