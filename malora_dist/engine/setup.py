"""From a recipe to the parts of a run: base model, adapters, engine. The last places that read the recipe."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from malora_dist.config import RunConfig
from malora_dist.config.deepspeed import deepspeed_config
from malora_dist.engine.build import OptimizerSettings
from malora_dist.model import Place, load_base_model
from malora_dist.nn.inject import InjectionReport, inject_adapters
from malora_dist.parallel.groups import World, from_main, replicate
from malora_dist.parallel.zero import partition_at_once
from malora_dist.source import native_dtype
from malora_dist.summary import adapter_spec


def engine_config(config: RunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration of this run."""
    result = deepspeed_config(config, world.size)
    # DeepSpeed would replace F.linear for the whole process by one that breaks non-reentrant recomputation.
    result["zero_optimization"].setdefault("memory_efficient_linear", False)
    return result


def base_model(config: RunConfig, folder: Path, world: World, deepspeed_settings: dict[str, Any]) -> Any:
    """The frozen base, placed as the ZeRO stage wants it while it is being read."""
    place: Place = partition_at_once(deepspeed_settings) if config.parallel.zero_stage == 3 else replicate
    model = load_base_model(
        folder,
        dtype=base_dtype(config, world),
        load_in_4bit=config.model.load_in_4bit,
        double_quant=config.model.bnb_4bit_use_double_quant,
        attn_implementation=config.model.attn_implementation,
        device=world.device,
        reader=world.is_main,
        place=place,
    )
    if config.train.gradient_checkpointing:
        # Reentrant checkpointing would run forward without a graph and lose the balance loss's gradient.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def base_dtype(config: RunConfig, world: World) -> torch.dtype:
    """model.dtype; `auto` is what the main process computes natively, on all processes."""
    if config.model.dtype == "auto":
        dtype: torch.dtype = from_main(native_dtype(world.device))
        return dtype
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.dtype]


def add_adapters(model: nn.Module, config: RunConfig) -> InjectionReport:
    """Inject the recipe's mixture. Built outside zero.Init, so that every rank draws the same whole tensors."""
    adapter = config.adapter
    return inject_adapters(
        model,
        adapter_spec(config),
        adapter.target_modules,
        lora_dropout=adapter.lora_dropout,
        computation=adapter.computation,
        seed=config.train.seed,
    )


def optimizer_settings(config: RunConfig, total_steps: int) -> OptimizerSettings:
    """AdamW and schedule; warm-up is rounded up to whole steps, as transformers does."""
    train = config.train
    return OptimizerSettings(
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=math.ceil(total_steps * train.warmup_ratio),
        total_steps=total_steps,
    )
