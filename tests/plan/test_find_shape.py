"""Shapes from config.json, folders and GGUF files; what is not known is refused by name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from malora_dist.errors import ConfigError
from malora_dist.plan.find_shape import find_shape, shape_of
from tests.config.recipes import RECIPES
from tests.tiny_models import smollm2_file

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
}


def test_the_shipped_models_have_the_published_sizes() -> None:
    assert find_shape(str(RECIPES / "models" / "llama2-7b.json")).num_parameters == 6_738_415_616
    assert find_shape(str(RECIPES / "models" / "llama2-70b.json")).num_parameters == 68_976_648_192


def test_a_gguf_file_is_read_without_conversion() -> None:
    """SmolLM2-135M, whose head is its embedding."""
    shape = find_shape(str(smollm2_file()))
    assert shape.num_parameters == 134_515_008
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.tied_head) == (30, 9, 3, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nobodys"}, "model_type='nobodys' is not a model type of transformers"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not a model type of transformers"),
        ({"model_type": "vit"}, "model_type='vit' is not a causal language model"),
        ({"model_type": "phi", "hidden_size": "48"}, "transformers cannot build this model: "),
        ({"hidden_size": None}, "hidden_size=None must be a whole number above 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be a whole number"),
        ({"vocab_size": True}, "vocab_size=True must be a whole number"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {message}"):
        shape_of(GOOD | changes, "here")


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json"))
    for text in ("{", "[" * 100_000):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ConfigError, match="is not valid JSON"):
            find_shape(str(tmp_path / "broken.json"))
    for missing in (str(tmp_path / "none.json"), str(tmp_path / "none.gguf"), "nobody/has-this-model"):
        with pytest.raises(ConfigError, match="--model path/to/config.json"):
            find_shape(missing)
    head = b"GGUF\x03\0\0\0"
    for content in (b"", b"GGUX", b"GGUF", head + b"\xff" * 16, head + (b"\1" + b"\0" * 7) * 2):
        (tmp_path / "no.gguf").write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as GGUF"):
            find_shape(str(tmp_path / "no.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"malora_dist\[gguf\]"):
        find_shape(str(tmp_path / "no.gguf"))
