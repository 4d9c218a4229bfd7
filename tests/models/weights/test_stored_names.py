"""Checkpoints of other names and layouts than the model's: read as transformers reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.models.load import build_empty_model, load_base_model
from malora_dist.models.weights.stored_names import StoredAs, stored_names
from tests.families import family_config, family_model

IDS = torch.tensor([[3, 5, 9, 11, 60, 7, 30, 4]])
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _theirs(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _save(folder: Path, family: str, change: Change = dict) -> list[str]:
    """Write a tiny model whose tensors are changed; their names."""
    family_model(family).save_pretrained(folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return list(tensors)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model.").removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _with_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}


def _with_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    return tensors | {f"gpt_neox.layers.{i}.attention.bias": mask.clone() for i in range(2)}


@pytest.mark.parametrize(
    ("family", "change", "held"),
    [
        pytest.param("gpt_neox", dict, "embed_out.weight", id="embed_out"),
        pytest.param("gpt_neox", _with_masks, "gpt_neox.layers.0.attention.bias", id="masks-of-booleans"),
        pytest.param("llama", _without_prefix, "layers.0.mlp.up_proj.weight", id="without-model."),
        pytest.param("gpt2", _without_prefix, "h.0.attn.c_attn.weight", id="without-transformer."),
        pytest.param("mixtral", dict, "model.layers.0.block_sparse_moe.experts.0.w1.weight", id="experts-apart"),
        pytest.param("hrm_text", dict, "", id="projections-in-one"),
    ],
)
def test_the_numbers_are_those_of_transformers(tmp_path: Path, family: str, change: Change, held: str) -> None:
    names = _save(tmp_path, family, change)
    assert not held or held in names
    ours = _logits(load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=False))
    torch.testing.assert_close(ours, _theirs(tmp_path), rtol=0, atol=0)


def test_the_text_of_a_model_of_pictures(tmp_path: Path) -> None:
    """Its causal language model is a part of what is stored, under other names."""
    from transformers import AutoModelForImageTextToText

    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = family_config("qwen3_5", vision_config=vision | {"num_position_embeddings": 16})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    assert "model.language_model.embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    ours = load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=False)
    assert type(ours).__name__ == "Qwen3_5ForCausalLM" and torch.equal(_logits(ours), _theirs(tmp_path))


def test_parts_of_what_is_made_of_others(tmp_path: Path) -> None:
    """ZeRO-3 reads each tensor in parts."""
    _save(tmp_path, "mixtral")

    def place_part(shape: tuple[int, ...], dtype: torch.dtype, read: Any) -> torch.nn.Parameter:
        half = torch.Size(shape).numel() // 2
        value = torch.cat([read(0, half), read(half, torch.Size(shape).numel())])
        return torch.nn.Parameter(value.view(shape).to(dtype), requires_grad=False)

    ours = load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=False, place_part=place_part)
    assert torch.equal(_logits(ours), _theirs(tmp_path))


def test_experts_of_another_size_are_named(tmp_path: Path) -> None:
    def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor[:-1].contiguous() if name.endswith("experts.1.w1.weight") else tensor
            for name, tensor in tensors.items()
        }

    _save(tmp_path, "mixtral", narrower)
    with pytest.raises(ConfigError, match="experts.gate_up_proj cannot be made of .*experts.1.w1.weight"):
        load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=False)


def test_what_no_name_stands_for_is_left_out(tmp_path: Path) -> None:
    _save(tmp_path, "llama")
    model = build_empty_model(tmp_path, dtype=torch.float32)
    found = stored_names(model, ["model.norm.weight", "norm.weight", "lm_head.bias", "model.rotary_emb.inv_freq"])
    # Sorted, so that the order in a file says nothing.
    assert found == {"model.norm.weight": StoredAs(("model.norm.weight",))}
