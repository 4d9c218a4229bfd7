"""Checkpoints that transformers and bitsandbytes quantised: the same bits as ours, or a refusal that says why."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from malora_dist.errors import ConfigError
from malora_dist.models.load import build_empty_model, load_base_model
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.ops.nf4 import pack_nf4
from malora_dist.ops.nf4_layout import nf4_bytes
from tests.tiny_models import save_tiny_llama, tiny_config

IDS = torch.tensor([[3, 60, 17, 0, 5, 5, 41, 8, 9, 33]])


def _quantise(folder: Path, **settings: Any) -> Path:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny_llama(folder / "plain")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16, **settings}
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder / "stored")
    return folder / "stored"


def _as_bitsandbytes(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    return pack_nf4(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_stored_nf4_model_is_taken_over_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double_quant: bool, storage: torch.dtype
) -> None:
    settings = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_storage": storage}
    stored = _quantise(tmp_path, **settings)
    assert CheckpointWeights(stored).mistakes(build_empty_model(stored, dtype=torch.bfloat16)) == []
    ours = load_base_model(stored, double_quant=double_quant)
    monkeypatch.setattr("malora_dist.models.weights.checkpoint.quantize_nf4", _as_bitsandbytes)
    from_plain = load_base_model(tmp_path / "plain", double_quant=double_quant)
    pairs = list(zip(ours.named_parameters(), from_plain.named_parameters(), strict=True))
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert sum(isinstance(module, NF4Linear) for module in ours.modules()) == 14
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, from_plain(IDS).logits)
    assert not hasattr(ours.config, "quantization_config")


def test_a_stored_blob_is_not_recomputed(tmp_path: Path) -> None:
    """A code changed in the file is a code changed in the model."""
    stored = _quantise(tmp_path)
    tensors = load_file(stored / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][5] ^= 255
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    ours = load_base_model(stored).get_submodule("model.layers.0.mlp.up_proj").packed_weight
    other = load_base_model(tmp_path / "plain").get_submodule("model.layers.0.mlp.up_proj").packed_weight
    assert ours.numel() == nf4_bytes(48 * 80) and (ours != other).nonzero().tolist() == [[5]]


def test_modules_that_were_skipped_are_quantised_now(tmp_path: Path) -> None:
    stored = _quantise(tmp_path, llm_int8_skip_modules=["lm_head", "up_proj"])
    assert load_file(stored / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    pairs = zip(load_base_model(stored).parameters(), load_base_model(tmp_path / "plain").parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}, "quantization_config.quant_method='gptq': only bitsandbytes' nf4"),
        ({"quant_method": "awq"}, {}, "quantization_config.quant_method='awq'"),
        ({"quant_method": "fp8"}, {"load_in_4bit": False}, "quantization_config.quant_method='fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "'bitsandbytes' and 8-bit weights: only"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {}, "'bitsandbytes' and fp4 weights: only"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            {"load_in_4bit": False},
            "model.load_in_4bit=false cannot be had",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            {"double_quant": True},
            "model.bnb_4bit_use_double_quant=true, but .*'bitsandbytes' and bnb_4bit_use_double_quant=false",
        ),
    ],
)
def test_what_is_not_read_is_refused_before_any_weight(
    tmp_path: Path, stored: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    tiny_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(ConfigError, match=message):
        load_base_model(tmp_path, **wanted)


@pytest.mark.parametrize(
    ("part", "change", "rule"),
    [
        ("quant_state.bitsandbytes__nf4", lambda t: _edited(t, blocksize=128), "blocks of 64"),
        ("quant_state.bitsandbytes__nf4", lambda t: _edited(t, shape=[48, 80]), r"shape \(80, 48\)"),
        ("quant_state.bitsandbytes__nf4", lambda t: _edited(t, nested_blocksize=64), "scales in blocks of 256"),
        ("quant_map", lambda t: t.flip(0), "the nf4 code"),
        ("nested_quant_map", lambda t: t.flip(0), "the 8-bit code of scales"),
    ],
)
def test_a_stored_weight_with_other_settings_is_named(tmp_path: Path, part: str, change: Any, rule: str) -> None:
    stored = _quantise(tmp_path, bnb_4bit_use_double_quant=True)
    tensors = load_file(stored / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"]).contiguous()
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{name} is stored in 4 bits, but not with {rule}"):
        load_base_model(stored, double_quant=True)


def _edited(packed: torch.Tensor, **values: Any) -> torch.Tensor:
    state = {**json.loads(bytes(packed.tolist())), **values}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
