"""Activations against the storages that a real forward saves for backward."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import mixture_spec
from malora_dist.config import config_from_dict
from malora_dist.config.summary import adapter_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.models.load import load_base_model
from malora_dist.models.loss_head import install_loss_head
from malora_dist.models.packed_attention import TORCH_VARLEN, attention_arguments
from malora_dist.models.packed_masks import packed_row
from malora_dist.ops.products import kept_weight_copies
from malora_dist.plan.activations import (
    INDEX,
    activation_bytes,
    block_bytes,
    logit_bytes,
    saved_logit_bytes,
)
from malora_dist.plan.find_shape import find_shape
from malora_dist.plan.parameters import weight_copy_bytes
from malora_dist.plan.run import Run, is_grouped, run_of
from tests.adapters.varlen_kernel import kernel_on_cpu
from tests.config.recipes import recipe
from tests.plan.real_runs_workers import saved_bytes
from tests.tiny_models import save_tiny_llama

# A quarter of SmolLM2-135M: as many heads a kv-head, the same ratio of widths.
SIZES = {
    "vocab_size": 211,
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LAYERS, TOKENS = 5, 48
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "bf16-dropout": {"model": {"dtype": "bfloat16"}, "adapter": {"lora_dropout": 0.1}},
    "fp32-dropout-double-quant": {"model": {"bnb_4bit_use_double_quant": True}, "adapter": {"lora_dropout": 0.1}},
    "bf16-one-sample": {"model": {"dtype": "bfloat16"}, "train": {"per_device_train_batch_size": 1}},
    "fp32-eager": {"model": {"attn_implementation": "eager"}},
    "bf16-sdpa": {"model": {"attn_implementation": "sdpa", "dtype": "bfloat16"}},
    "bf16-eager": {"model": {"attn_implementation": "eager", "dtype": "bfloat16"}},
    "bf16-plain-base": {"model": {"load_in_4bit": False, "dtype": "bfloat16"}},
    "fp32-molora": {"adapter": {"method": "molora"}},
    "bf16-molora-grouped": {"model": {"dtype": "bfloat16"}, "adapter": {"method": "molora", "computation": "grouped"}},
    "fp32-malora-grouped": {"adapter": {"computation": "grouped"}},
    "bf16-lora-dropout": {
        "model": {"dtype": "bfloat16"},
        "adapter": {"method": "lora", "lora_dropout": 0.1, "num_experts": None},
    },
    "bf16-dora-dropout": {
        "model": {"dtype": "bfloat16"},
        "adapter": {"method": "dora", "lora_dropout": 0.1, "num_experts": None},
    },
    "fp32-dora": {"adapter": {"method": "dora", "num_experts": None}},
    "bf16-hydralora": {"model": {"dtype": "bfloat16"}, "adapter": {"method": "hydralora"}},
    "fp32-few-targets": {"adapter": {"target_modules": ["q_proj", "o_proj"]}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("activations")
    for layers in (LAYERS, LAYERS - 1):
        save_tiny_llama(path / str(layers), **SIZES, num_hidden_layers=layers)
    return path


def case_config(folder: Path, name: str, layers: int, checkpointing: bool) -> Any:
    case = CASES[name]
    adapter = {"num_experts": 4, "r": 6, "lora_dropout": 0.0} | case.get("adapter", {})
    train = {"per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing} | case.get("train", {})
    return config_from_dict(
        recipe(
            model={"name_or_path": str(folder / str(layers)), "dtype": "float32"} | case.get("model", {}),
            adapter={key: value for key, value in adapter.items() if value is not None},
            data={"max_seq_length": TOKENS},
            train=train,
        )
    )


def planned(folder: Path, name: str, layers: int = LAYERS, checkpointing: bool = False) -> Run:
    config = case_config(folder, name, layers, checkpointing)
    run = run_of(config, adapter_spec(config), find_shape(config.model.name_or_path), 1)
    return replace(run, targets_per_sample=TOKENS - 1)


def built(folder: Path, name: str, layers: int, checkpointing: bool) -> tuple[Any, MicroBatch]:
    """The case's model with adapters, and a micro-batch."""
    config = case_config(folder, name, layers, checkpointing)
    attention = planned(folder, name, layers, checkpointing).attention
    model = load_base_model(
        Path(config.model.name_or_path),
        dtype=getattr(torch, config.model.dtype),
        load_in_4bit=config.model.load_in_4bit,
        double_quant=config.model.bnb_4bit_use_double_quant,
        attn_implementation=TORCH_VARLEN if attention == "varlen" else attention,
    )
    assert install_loss_head(model)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    adapter = config.adapter
    inject_adapters(
        model,
        adapter_spec(config),
        adapter.target_modules,
        lora_dropout=adapter.lora_dropout,
        computation=adapter.computation,
    )
    model.train()
    draw = np.random.default_rng(0)
    samples = [Sample(i, 0, draw.integers(0, 211, TOKENS).astype(np.int32), 1) for i in range(2)]
    batch = collate(samples[: config.train.per_device_train_batch_size])
    set_token_keys(model, batch, 0, 1)
    return model, batch


def measured(folder: Path, name: str, layers: int = LAYERS, checkpointing: bool = False, loss: bool = True) -> int:
    """Bytes that one process saves in a forward, with the loss or up to the head's input."""
    model, batch = built(folder, name, layers, checkpointing)
    with kernel_on_cpu():
        if loss:
            return saved_bytes(model, lambda: cross_entropies(model, batch))
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        inputs |= attention_arguments(model, batch)
        with packed_row(batch):
            return saved_bytes(model, lambda: model.model(**inputs).last_hidden_state)


@pytest.mark.parametrize("name", CASES)
def test_within_15_percent_of_what_forward_saves(folder: Path, name: str) -> None:
    run = planned(folder, name)
    assert activation_bytes(run) + saved_logit_bytes(run) == pytest.approx(measured(folder, name), rel=0.15)


@pytest.mark.parametrize("name", CASES)
def test_a_block_alone(folder: Path, name: str) -> None:
    """Closely, so that a forgotten tensor shows; the grouped form and eager attention count a few that are not kept."""
    block = measured(folder, name) - measured(folder, name, LAYERS - 1)
    tolerance = 0.1 if "grouped" in name else 0.05 if "eager" in name else 0.01
    assert block_bytes(planned(folder, name)) == pytest.approx(block, rel=tolerance)


@pytest.mark.parametrize(
    "name", ["fp32", "bf16-sdpa", "bf16-dropout", "bf16-one-sample", "fp32-molora", "bf16-lora-dropout"]
)
def test_with_recomputation_within_15_percent(folder: Path, name: str) -> None:
    """What forward keeps of all blocks; the block that is computed again comes on top."""
    run = planned(folder, name, checkpointing=True)
    kept = activation_bytes(run) - block_bytes(run) + saved_logit_bytes(run)
    assert kept == pytest.approx(measured(folder, name, checkpointing=True), rel=0.15)
    assert activation_bytes(run) < activation_bytes(planned(folder, name))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_loss_keeps_what_is_planned(folder: Path, name: str) -> None:
    """What a forward saves with the loss, less what it saves up to the head; one index of the targets apart."""
    whole = measured(folder, name)
    without = measured(folder, name, loss=False)
    run = planned(folder, name)
    assert whole - without == pytest.approx(saved_logit_bytes(run), abs=run.targets * INDEX)


@pytest.mark.parametrize("name", CASES)
def test_weight_copies_are_those_of_a_micro_batch(folder: Path, name: str) -> None:
    model, batch = built(folder, name, LAYERS, checkpointing=False)
    with kept_weight_copies(model), kernel_on_cpu():
        cross_entropies(model, batch).sum().backward()
        kept = [module.weight_copies for module in model.modules() if hasattr(module, "weight_copies")]
        found = sum(tensor.nbytes for copies in kept for tensor in copies.tensors.values())
    # The first block needs no gradient of its input, and then nothing of a router alone.
    assert 0.99 * weight_copy_bytes(planned(folder, name)) <= found <= weight_copy_bytes(planned(folder, name))


@pytest.mark.parametrize("targets", [100, 1000])
def test_logits_of_a_chunk_are_all_there_are(llama_run: Run, targets: int) -> None:
    """LLaMA-2 7B in bf16: 2097 rows of 32000 logits fit a chunk, in 2 bytes and in 4; 4096 gradients are kept a row."""
    run = replace(llama_run, micro_batch=4, targets_per_sample=targets)
    rows = {100: 400, 1000: 2097}[targets]
    assert logit_bytes(run) == rows * 32_000 * 6 + 4 * targets * (4096 * 2 + 4)


@pytest.mark.parametrize("computation", ["auto", "dense", "grouped", "grouped_triton"])
@pytest.mark.parametrize("method", ["malora", "lora"])
def test_the_form_is_the_layers_choice(llama_run: Run, method: str, computation: str) -> None:
    spec = mixture_spec(method, num_experts=64, r=32)
    with torch.device("meta"):
        layer = MixtureLinear(nn.Linear(8, 8), spec, in_features=8, out_features=8, computation=computation)
    assert is_grouped(replace(llama_run, spec=spec, computation=computation)) == layer.grouped
