"""Tied parameters with a value for each name in the checkpoint: two parameters if the values differ, one if not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from malora_dist.models.load import base_tensors, build_empty_model, load_base_model
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.prepared import PreparedWeights, prepared_folder, write_prepared
from malora_dist.models.weights.ties import differing_ties, untie
from tests.families import family_model

IDS = torch.tensor([[3, 5, 9, 11, 60, 7, 30, 4]])


def _save(folder: Path, family: str, head: str, *, differs: bool) -> None:
    """Write a tied model whose file holds the head too; with one number of its own where it `differs`."""
    model = family_model(family, tie_word_embeddings=True)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    own = model.get_input_embeddings().weight.detach().clone()
    if differs:
        own[63, 31] += 3
    save_file(tensors | {head: own}, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize(("family", "head"), [("llama", "lm_head.weight"), ("gpt_neox", "embed_out.weight")])
def test_a_head_of_its_own_is_used(tmp_path: Path, family: str, head: str, differs: bool, load_in_4bit: bool) -> None:
    from transformers import AutoModelForCausalLM

    _save(tmp_path, family, head, differs=differs)
    ours = load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=load_in_4bit)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for find in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(ours, find)().weight, getattr(theirs, find)().weight)
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) != differs
    if not load_in_4bit:
        assert torch.equal(_logits(ours), _logits(theirs))


def _prepare(folder: Path, cache: Path) -> PreparedWeights:
    prepared, identity = prepared_folder(folder, dtype=torch.bfloat16, double_quant=False, cache_dir=cache)
    model, weights = build_empty_model(folder, dtype=torch.bfloat16), CheckpointWeights(folder)
    untied = weights.untied_names(model)
    untie(model, untied)
    tensors = base_tensors(model, weights.stored_names(model), load_in_4bit=True, double_quant=False)
    write_prepared(prepared, identity, dict.fromkeys(tensors.values()), weights, untied=untied)
    return PreparedWeights(prepared)


@pytest.mark.parametrize("differs", [True, False])
def test_a_prepared_base_says_so_itself(tmp_path: Path, differs: bool) -> None:
    folder = tmp_path / "model"
    _save(folder, "llama", "lm_head.weight", differs=differs)
    ours = load_base_model(folder, weights=_prepare(folder, tmp_path))
    wanted = load_base_model(folder)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) != differs
    assert torch.equal(ours.lm_head.weight, wanted.lm_head.weight)


@pytest.mark.parametrize("differs", [True, False])
def test_linears_of_a_prepared_base_differ_as_those_of_its_model(tmp_path: Path, differs: bool) -> None:
    """The blocks that Zamba shares are tied, and they are quantised: their names are others."""
    folder = tmp_path / "model"
    family_model("zamba").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    first = next(name for name in tensors if name.endswith("shared_transf.feed_forward.down_proj.weight"))
    second = first.replace("layers.1", "layers.3")
    assert second not in tensors and second != first
    tensors[second] = tensors[first] * (1.5 if differs else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours, wanted = load_base_model(folder, weights=_prepare(folder, tmp_path)), load_base_model(folder)
    layers = [model.get_submodule(name.removesuffix(".weight")) for model in (ours, wanted) for name in (first, second)]
    packed = [layer.packed_weight for layer in layers]
    assert torch.equal(packed[0], packed[2]) and torch.equal(packed[1], packed[3])
    assert torch.equal(packed[0], packed[1]) != differs
    assert torch.equal(_logits(ours), _logits(wanted))


def test_no_more_is_read_than_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("malora_dist.models.weights.ties.ELEMENTS_AT_ONCE", 100)
    _save(tmp_path, "llama", "lm_head.weight", differs=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, weights = build_empty_model(tmp_path, dtype=torch.float32), CheckpointWeights(tmp_path)
    stored, before = weights.stored_names(model), weights.bytes_read
    assert differing_ties(model, stored, weights.reader) == ["lm_head.weight"]
    assert weights.bytes_read - before == 2 * 100 * 4
