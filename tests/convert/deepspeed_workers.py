"""Real checkpoints of DeepSpeed: a PEFT model trained for two steps and saved by `save_checkpoint`."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from malora_dist.distributed.process_groups import World
from tests.tiny_models import tiny_llama


def save_all(world: World, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    """For each case folder/NAME as DeepSpeed writes it, and NAME.safetensors with what the LoRA is."""
    for name, case in cases.items():
        _save(world, Path(folder) / name, case)


def _save(world: World, target: Path, case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
    config = LoraConfig(**settings | case.get("peft", {}))
    model = get_peft_model(tiny_llama(), config).train()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": case.get("bf16", False)},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}},
        },
    )
    ids = torch.arange(20)[None] + world.rank
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(target))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=case["stage"] == 3):
        tensors = {name: parameter.detach().clone() for name, parameter in trained.items()}
    if world.is_main:
        save_file(tensors, f"{target}.safetensors")
        config.base_model_name_or_path = "some/base"
        config.save_pretrained(str(target))
