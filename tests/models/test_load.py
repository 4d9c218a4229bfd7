"""The base loader against transformers' own, with and without 4 bits, as reader and as one of the others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.models.load import load_base_model, load_tokenizer
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.nf4 import dequantize_nf4, quantize_nf4
from tests.families import family_model, without_compiler
from tests.tiny_models import byte_tokenizer, save_tiny_llama

IDS = torch.tensor([[3, 60, 17, 0, 5, 5, 41, 8, 9, 33]])
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "sharded": {"max_shard_size": "20KB"},
    "tied-sharded": {"tie_word_embeddings": True, "max_shard_size": "20KB"},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
}


def _save(folder: Path, kind: str = "untied") -> Path:
    save_tiny_llama(folder, **KINDS[kind])
    assert (folder / "model.safetensors.index.json").exists() == ("max_shard_size" in KINDS[kind])
    return folder


def _from_pretrained(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_plain_load_equals_from_pretrained(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = _save(tmp_path, kind)
    ours, theirs = load_base_model(folder, dtype=dtype, load_in_4bit=False), _from_pretrained(folder, dtype)
    assert torch.equal(_logits(ours), _logits(theirs))
    expected, state = theirs.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) and state[name].dtype == dtype for name in expected)
    assert not any(tensor.is_meta for tensor in [*ours.parameters(), *ours.buffers()])
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == kind.startswith("tied")


@pytest.mark.parametrize("kind", ["untied", "llama3-rope"])
def test_rotary_frequencies_are_rebuilt(tmp_path: Path, kind: str) -> None:
    folder = _save(tmp_path, kind)
    ours = dict(load_base_model(folder, dtype=torch.bfloat16).named_buffers())
    theirs = dict(_from_pretrained(folder, torch.bfloat16).named_buffers())
    assert ours.keys() == theirs.keys() and "model.rotary_emb.inv_freq" in ours
    for name, buffer in theirs.items():
        assert torch.equal(ours[name], buffer) and ours[name].dtype == torch.float32, name


def _quantised_reference(folder: Path, dtype: torch.dtype, double_quant: bool) -> Any:
    """from_pretrained, then every linear but the head in 4 bits and back."""
    model = _from_pretrained(folder, dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            packed = quantize_nf4(module.weight, double_quant)
            module.weight.data = dequantize_nf4(packed, tuple(module.weight.shape), dtype, double_quant)
    return model


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["untied", "tied-sharded", "biases"])
def test_4bit_load_equals_an_ordinary_load_then_quantised(
    tmp_path: Path, kind: str, dtype: torch.dtype, double_quant: bool
) -> None:
    folder = _save(tmp_path, kind)
    ours = load_base_model(folder, dtype=dtype, double_quant=double_quant)
    quantised = {name for name, module in ours.named_modules() if isinstance(module, NF4Linear)}
    theirs = _quantised_reference(folder, dtype, double_quant)
    linears = {name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)}
    assert quantised == linears - {"lm_head"} and len(quantised) == 2 * 7
    assert ours.lm_head.weight.dtype == ours.model.embed_tokens.weight.dtype == dtype
    logits = _logits(ours)
    assert torch.equal(logits, _logits(theirs))
    assert not torch.equal(logits, _logits(_from_pretrained(folder, dtype)))


@pytest.mark.parametrize(("kind", "load_in_4bit"), [("untied", True), ("tied", False), ("biases", True)])
def test_placement_gives_every_parameter_once_and_in_order(tmp_path: Path, kind: str, load_in_4bit: bool) -> None:
    """What the reader places is all that another process needs, which has only the config."""
    whole = _save(tmp_path / "whole", kind)
    config_only = tmp_path / "config"
    config_only.mkdir()
    shutil.copy(whole / "config.json", config_only)
    sent: list[tuple[nn.Parameter, Tensor]] = []
    received: list[nn.Parameter] = []

    def send(parameters: list[nn.Parameter]) -> None:
        sent.extend((parameter, parameter.data.clone()) for parameter in parameters)

    def receive(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            value = sent[len(received)][1]
            assert (parameter.shape, parameter.dtype) == (value.shape, value.dtype)
            parameter.data.copy_(value)
            received.append(parameter)

    options: dict[str, Any] = {"dtype": torch.bfloat16, "load_in_4bit": load_in_4bit, "double_quant": True}
    reader = load_base_model(whole, place=send, **options)
    other = load_base_model(config_only, reader=False, place=receive, **options)
    for model, placed in ((reader, [parameter for parameter, _ in sent]), (other, received)):
        assert len({id(p) for p in placed}) == len(placed)
        assert {id(p) for p in placed} == {id(p) for p in model.parameters()}
    assert torch.equal(_logits(other), _logits(reader))


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_named(tmp_path: Path, name: str, load_in_4bit: bool) -> None:
    folder = _save(tmp_path)
    _rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError) as caught:
        load_base_model(folder, load_in_4bit=load_in_4bit)
    assert name in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_weight_of_another_shape_is_named(tmp_path: Path, load_in_4bit: bool) -> None:
    folder = _save(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(ConfigError, match=rf"{name} has shape \(80, 48\), the config says \(48, 80\)"):
        load_base_model(folder, load_in_4bit=load_in_4bit)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        load_base_model(folder)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_must_name_its_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "whole")
    assert load_tokenizer(tmp_path / "whole").eos_token_id == 2
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path / "endless")
    assert "eos_token" in str(caught.value) and str(tmp_path / "endless") in str(caught.value)


def test_the_bases_own_dropout_is_off(tmp_path: Path) -> None:
    """Its masks would depend on how samples are dealt to processes."""
    save_tiny_llama(tmp_path, attention_dropout=0.5)
    model = load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=False).train()
    assert model.config.attention_dropout == 0.0
    ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_no_weight_is_changed_in_place(tmp_path: Path, load_in_4bit: bool) -> None:
    """RWKV halves weights and hidden states every few layers, against overflows of 16-bit numbers."""
    with without_compiler():
        family_model("rwkv", rescale_every=1).save_pretrained(tmp_path)
        ours = load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=load_in_4bit)
        theirs = _from_pretrained(tmp_path, torch.float32, attention="eager")
        if load_in_4bit:
            for name, module in ours.named_modules():
                if isinstance(module, NF4Linear):
                    theirs.get_submodule(name).weight.data = module.weight
        wanted = _logits(theirs)
        torch.testing.assert_close(_logits(ours), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_generation_settings_do_not_reach_training(tmp_path: Path) -> None:
    """A cache would make transformers ignore how samples are packed into a row."""
    folder = _save(tmp_path)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert load_base_model(folder).config.use_cache is False
