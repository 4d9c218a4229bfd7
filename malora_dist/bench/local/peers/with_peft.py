"""LoRA and DoRA as the package `peft` does them."""

from collections.abc import Sequence

import torch
from torch import nn

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.errors import ConfigError


def add_peft(
    model: nn.Module, spec: MixtureSpec, targets: Sequence[str], *, dropout: float, fp32: bool, seed: int
) -> nn.Module:
    """Add PEFT's adapters to linears of `targets`, in fp32 or the model's dtype. Raises ConfigError without PEFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("the package peft is not installed: pip install peft") from error
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=list(targets),
        lora_dropout=dropout,
        use_dora=spec.structure.magnitude,
        task_type="CAUSAL_LM" if hasattr(model, "config") else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    return adapted.train()
