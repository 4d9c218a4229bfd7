"""Real runs of small models, and what they hold and send; all cases of a number of processes in one launch."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from malora_dist.config import RunConfig, config_from_dict
from malora_dist.config.summary import adapter_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.plan.find_shape import find_shape
from malora_dist.plan.run import Lengths, Run, run_of
from tests.config.recipes import recipe
from tests.multiprocess import run_distributed
from tests.tiny_models import save_tiny_llama

TOKENS, STEPS, ACCUMULATION = 8, 3, 2
# Sizes that no number of processes divides, so that padding shows.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 52,
    "tie_word_embeddings": True,
}
ADAPTER: dict[str, Any] = {"num_experts": 4, "top_k": 2, "r": 3, "lora_dropout": 0.0}
ALL_SPLIT = {"stage3_param_persistence_threshold": 0}
SHORT_OF_ROOM = ALL_SPLIT | {"stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 20_000}
DEEP = {"num_hidden_layers": 6, "tie_word_embeddings": False}

# name: sections of the recipe, `zero` for DeepSpeed's own settings, `sizes` for the model.
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"parallel": {"zero_stage": 0}},
    "zero1": {"parallel": {"zero_stage": 1}},
    "zero2": {"parallel": {"zero_stage": 2}},
    "zero3": {"zero": ALL_SPLIT},
    "zero3-double-quant": {"zero": ALL_SPLIT, "model": {"bnb_4bit_use_double_quant": True}},
    "zero3-persistent": {},
    "zero3-some-persistent": {"zero": {"stage3_param_persistence_threshold": 300}},
    "zero3-molora-untied": {
        "zero": ALL_SPLIT,
        "adapter": {"method": "molora"},
        "sizes": {"tie_word_embeddings": False, "attention_bias": True},
    },
    "zero3-lora-bf16": {
        "zero": ALL_SPLIT,
        "adapter": {"method": "lora"},
        "model": {"dtype": "bfloat16", "load_in_4bit": False},
    },
    "zero2-lora": {"parallel": {"zero_stage": 2}, "adapter": {"method": "lora"}},
    "zero3-ep2": {"zero": ALL_SPLIT, "parallel": {"ep_size": 2}},
    "zero0-ep2": {"parallel": {"zero_stage": 0, "ep_size": 2}},
    "zero2-ep2": {"parallel": {"zero_stage": 2, "ep_size": 2}},
    "zero0-8bit": {
        "parallel": {"zero_stage": 0},
        "adapter": {"r": 40, "shared_r": 40},
        "train": {"optim": "adamw_8bit"},
    },
    "zero2-8bit": {"parallel": {"zero_stage": 2}, "train": {"optim": "adamw_8bit"}},
    "zero3-8bit": {"zero": ALL_SPLIT, "train": {"optim": "adamw_8bit"}},
    "zero2-router-h": {
        "parallel": {"zero_stage": 2},
        "adapter": {"router_input": "h", "router_z_loss_coef": 0.1},
        "model": {"dtype": "bfloat16", "load_in_4bit": False},
    },
    "zero2-8bit-rates": {
        "parallel": {"zero_stage": 2, "ep_size": 2},
        "train": {"optim": "adamw_8bit", "lr_ratios": {"shared_A": 0.5, "B": 4}},
    },
    "zero3-8bit-rates": {"zero": ALL_SPLIT, "train": {"optim": "adamw_8bit", "lr_ratios": {"router": 0.5, "B": 4}}},
    "zero0-adafactor": {"parallel": {"zero_stage": 0}, "train": {"optim": "adafactor"}},
    "zero3-short": {"zero": SHORT_OF_ROOM, "sizes": DEEP},
    "zero3-short-recompute": {"zero": SHORT_OF_ROOM, "sizes": DEEP, "train": {"gradient_checkpointing": True}},
}
# What another number of processes can change is the padding.
AT_FOUR = ["zero2", "zero3-double-quant", "zero3-some-persistent", "zero3-molora-untied", "zero3-ep2", "zero2-ep2"]


def case_config(folder: str, name: str, world_size: int) -> RunConfig:
    """The recipe of a case; its model and DeepSpeed file are written on first use."""
    case, place = CASES[name], Path(folder, name)
    sections = {section: case.get(section, {}) for section in ("model", "adapter", "parallel", "train")}
    adapter = ADAPTER if sections["adapter"].get("method") != "lora" else {"r": 3, "lora_dropout": 0.0}
    return config_from_dict(
        recipe(
            model={"name_or_path": str(place), "dtype": "float32"} | sections["model"],
            adapter=adapter | sections["adapter"],
            data={"max_seq_length": TOKENS},
            parallel={"zero_stage": 3, "ds_config": str(place / "ds.json")} | sections["parallel"],
            train={"per_device_train_batch_size": 1, "global_batch_size": ACCUMULATION * world_size, "max_steps": STEPS}
            | sections["train"],
        )
    )


def write_case(folder: str, name: str) -> None:
    """The case's model, its config.json alone to the plan, and its DeepSpeed file."""
    place = Path(folder, name)
    save_tiny_llama(place, **SIZES | CASES[name].get("sizes", {}))
    (place / "ds.json").write_text(json.dumps({"zero_optimization": CASES[name].get("zero", {})}))


def measure(folder: str, world_size: int) -> list[dict[str, Any]]:
    """What each rank measured in each case."""
    names = names_at(world_size)
    for name in names:
        write_case(folder, name)
    return run_distributed("tests.plan.real_runs_workers:run_cases", world_size, folder=folder, names=names)


def names_at(world_size: int) -> list[str]:
    return list(CASES) if world_size == 2 else AT_FOUR


def planned(folder: str, name: str, world_size: int) -> Run:
    config = case_config(folder, name, world_size)
    return run_of(config, adapter_spec(config), find_shape(config.model.name_or_path), world_size, lengths=Lengths())


def run_cases(world: Any, folder: str, names: list[str]) -> dict[str, Any]:
    return {name: run_case(world, case_config(folder, name, world.size)) for name in names}


def run_case(world: Any, config: RunConfig) -> dict[str, Any]:
    """A few steps; then what this process holds and what it sent in the last of them."""
    from malora_dist.distributed.expert_groups import create_expert_groups
    from malora_dist.evaluation.packed_forward import cross_entropies
    from malora_dist.training.base_model import base_model
    from malora_dist.training.deepspeed_engine import build_engine
    from malora_dist.training.run_context import RunContext
    from malora_dist.training.setup import add_adapters, engine_config, optimizer_settings
    from malora_dist.training.watchdog import Watchdog

    context = RunContext(config, world, Watchdog(world.rank))
    settings = engine_config(config, world)
    groups = create_expert_groups(config.parallel.ep_size, 60)
    model = base_model(context, Path(config.model.name_or_path), settings)
    add_adapters(model, context, settings, groups)
    stage = config.parallel.zero_stage
    optimizer = optimizer_settings(config, STEPS)
    engine = build_engine(model, settings, optimizer, zero_stage=stage, timeout_seconds=60, expert_groups=groups)
    sent: Counter[str] = Counter()
    peak = _watch_whole_tensors(engine.module)
    with _counting(sent):
        for step in range(1, STEPS + 1):
            sent.clear()
            for batch in _batches(world.rank, step):
                engine.backward(cross_entropies(engine, batch).sum())
                engine.step()
    return {
        "held": _held(engine.module),
        "whole": peak[0],
        "sent": dict(sent),
        **_optimizer_bytes(engine.optimizer, stage),
        # Last, since a forward under ZeRO-3 leaves weights whole.
        "saved": saved_bytes(engine.module, lambda: cross_entropies(engine, _batches(world.rank, STEPS)[0])),
    }


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages that backward or the balance loss needs after `forward`, parameters excepted."""
    from malora_dist.adapters.adapted_layers import mixture_layers

    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward().sum()
    for _, layer in mixture_layers(model):
        for tensor in layer.routing or ():
            if tensor is not None:
                keep(tensor)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in parameters)


def _batches(rank: int, step: int) -> list[MicroBatch]:
    draw = np.random.default_rng([rank, step])
    return [collate([Sample(i, i % 2, draw.integers(0, 97, TOKENS).astype(np.int32), 1)]) for i in range(ACCUMULATION)]


def _held(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters, by kind: parts, and the whole tensors that ZeRO-3 keeps."""
    total = {"base_4bit": 0, "base_other": 0, "adapters": 0}
    for parameter in model.parameters():
        kind = (
            "base_4bit" if parameter.dtype == torch.uint8 else "adapters" if parameter.requires_grad else "base_other"
        )
        for tensor in (getattr(parameter, "ds_tensor", None), parameter):
            total[kind] += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total


def _watch_whole_tensors(model: nn.Module) -> list[int]:
    """One number: the most bytes of parameters, without parts, that were there after any module's forward."""
    parameters, peak = list(model.parameters()), [0]

    def look(*_: object) -> None:
        peak[0] = max(peak[0], sum(p.numel() * p.element_size() for p in parameters))

    for module in model.modules():
        module.register_forward_hook(look)
    return peak


def _optimizer_bytes(optimizer: Any, stage: int) -> dict[str, Any]:
    """Bytes of the optimizer's state and, in fp32, of copies that share no memory with the model and of gradients."""
    state = (optimizer if stage == 0 else optimizer.optimizer).state.values()
    shared = ("step", "RMS", "qmap1", "qmap2")
    moments = sum(tensor.nbytes for entry in state for key, tensor in entry.items() if key not in shared)
    masters: list[Any] = []
    if stage in (1, 2):
        masters = list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat, strict=True))
    if stage == 3:
        masters = list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True))
    separate = [m for m, own in masters if m.untyped_storage().data_ptr() != own.untyped_storage().data_ptr()]
    found = {"moments": moments, "master": sum(master.nbytes for master in separate)}
    if stage == 3:
        buckets = [bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values()]
        found |= {"gradients": optimizer.grad_partitions_flat_buffer.nbytes, "reduce_bucket": sum(buckets)}
    return found


class _counting:
    """Counts the bytes of the whole tensor in each of DeepSpeed's collectives, by collective and dtype."""

    OPERATIONS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")

    def __init__(self, sent: Counter[str]) -> None:
        self.sent = sent

    def __enter__(self) -> None:
        from deepspeed.comm import comm

        self.backend = comm.cdb
        for name in self.OPERATIONS:
            setattr(self.backend, name, self._counted(name, getattr(self.backend, name)))

    def __exit__(self, *error: object) -> None:
        for name in self.OPERATIONS:
            delattr(self.backend, name)

    def _counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            tensors = [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel)
            self.sent[f"{name} {largest.dtype}"] += largest.numel() * largest.element_size()
            return operation(*arguments, **named)

        return counted
