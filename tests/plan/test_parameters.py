"""Parameters equal to those of the built model. What real processes hold is in test_real_runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import METHODS
from malora_dist.adapters.target_names import name_matches
from malora_dist.adapters.targets import all_linear, plain_names
from malora_dist.config import config_from_dict
from malora_dist.config.summary import adapter_spec
from malora_dist.models.load import build_empty_model
from malora_dist.plan.duration import step_flops
from malora_dist.plan.families import family_shape
from malora_dist.plan.find_shape import find_shape, shape_of
from malora_dist.plan.memory import bytes_per_rank
from malora_dist.plan.parameters import stored_tensors, trainable_parameters
from malora_dist.plan.run import Lengths, run_of
from malora_dist.plan.steps import step_bytes
from tests.config.recipes import recipe
from tests.families import families, family_config, without_compiler

LLAMA = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": LLAMA | HEADS | {"tie_word_embeddings": True},
    "untied-biases": LLAMA | HEADS | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "all-heads": LLAMA | {"num_attention_heads": 4},
    "head-dim": LLAMA | HEADS | {"head_dim": 20},
    "mistral": LLAMA | HEADS | {"model_type": "mistral"},
    "qwen2": LLAMA | HEADS | {"model_type": "qwen2"},
    "qwen3": LLAMA | HEADS | {"model_type": "qwen3", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_equal_to_the_built_model(tmp_path: Path, model: str, method: str) -> None:
    """Every tensor's size and number, on the meta device."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
    targets = ["q_proj", "mlp.down_proj", "o_proj"]
    adapter = {"method": method, "target_modules": targets}
    config = config_from_dict(recipe(model={"load_in_4bit": False}, adapter=adapter))
    run = run_of(config, adapter_spec(config), find_shape(str(tmp_path)), 1, lengths=Lengths())
    built = build_empty_model(tmp_path, dtype=torch.bfloat16)
    base = sum(parameter.numel() for parameter in built.parameters())
    report = inject_adapters(built, adapter_spec(config), targets)
    wanted = sorted((p.numel(), p.element_size()) for p in built.parameters())
    found = sorted((t.numel, t.itemsize) for t in stored_tensors(run) for _ in range(t.copies))
    assert found == wanted
    assert run.shape.num_parameters == base
    assert trainable_parameters(run) == report.trainable_parameters


@pytest.mark.parametrize("family", families())
def test_the_base_of_every_family_is_counted(family: str) -> None:
    """Each stored tensor once: blocks that places share, and heads that are embeddings."""
    config = config_from_dict(recipe(model={"load_in_4bit": False}, adapter={"r": 2, "target_modules": ["all-linear"]}))
    from transformers import AutoModelForCausalLM

    content = family_config(family).to_dict()
    with without_compiler(), torch.device("meta"):
        shape = family_shape(content, "here")
        built = AutoModelForCausalLM.from_config(family_config(family))
    run = run_of(config, adapter_spec(config), shape, 1, lengths=Lengths())
    found = sorted(t.numel for t in stored_tensors(run) if not t.trained for _ in range(t.copies))
    assert found == sorted(parameter.numel() for parameter in built.parameters())
    assert run.shape.num_parameters == sum(found)


@pytest.mark.parametrize("family", ["mixtral", "aria_text", "dbrx"])
def test_a_token_goes_through_the_experts_that_are_chosen(family: str) -> None:
    """Two of each of two layers, with three matrices; configurations name their number in many ways."""
    assert family_shape(family_config(family).to_dict(), "here").expert_multiplications == 2 * 2 * 3 * 32 * 48


@pytest.mark.parametrize("targets", [["all-linear"], [r".*\.1\..*"]])
@pytest.mark.parametrize(
    "family", ["phi", "gpt2", "gpt_neox", "bloom", "gemma2", "falcon", "mixtral", "deepseek_v3", "gemma3", "opt", "mpt"]
)
def test_equal_to_the_built_model_of_any_family(tmp_path: Path, family: str, targets: list[str]) -> None:
    """Blocks that differ, fused experts, Conv1D, and targets in some of the blocks."""
    family_config(family).save_pretrained(tmp_path)
    config = config_from_dict(recipe(model={"load_in_4bit": False}, adapter={"r": 2, "target_modules": targets}))
    run = run_of(config, adapter_spec(config), find_shape(str(tmp_path)), 1, lengths=Lengths())
    built = build_empty_model(tmp_path, dtype=torch.bfloat16)
    base = sum(parameter.numel() for parameter in built.parameters())
    names = [name for name in all_linear(built) if any(name_matches(target, name) for target in targets)]
    report = inject_adapters(built, adapter_spec(config), plain_names(built, {"all-linear": names}))
    found = sorted(t.numel for t in stored_tensors(run) for _ in range(t.copies))
    assert run.shape.num_parameters == base
    assert found == sorted(parameter.numel() for parameter in built.parameters())
    assert trainable_parameters(run) == report.trainable_parameters
    assert all(value >= 0 for value in bytes_per_rank(run)[0].values()) and step_flops(run) > 0


@pytest.mark.parametrize("model", MODELS)
def test_both_ways_to_a_shape_lead_to_the_same_run(tmp_path: Path, model: str) -> None:
    """Known layouts are counted without torch, others off the model: bytes, traffic and operations agree."""
    config = config_from_dict(
        recipe(adapter={"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]})
    )
    shapes = shape_of(MODELS[model], "here"), family_shape(MODELS[model], "here")
    runs = [run_of(config, adapter_spec(config), shape, 2, lengths=Lengths()) for shape in shapes]
    for count in (bytes_per_rank, step_bytes, step_flops, trainable_parameters):
        assert count(runs[0]) == count(runs[1]), count
