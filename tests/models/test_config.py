"""config.json and tokenizers: what transformers cannot read is said in words; code of a folder never runs unasked."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from malora_dist.errors import ConfigError
from malora_dist.models.config import own_code, read_model_config
from malora_dist.models.load import build_empty_model, load_base_model, load_tokenizer
from tests.models.own_code import keep_code_in, own_model
from tests.multiprocess import ROOT
from tests.tiny_models import byte_tokenizer, merging_tokenizer, save_tiny_llama, tiny_llama

TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _own_tokenizer(folder: Path, mark: Path) -> Path:
    byte_tokenizer().save_pretrained(folder)
    _edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    (folder / "tokenization_own.py").write_text(TOKENIZER_CODE.format(mark=str(mark)))
    return folder


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers asks on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    keep_code_in(tmp_path / "modules", monkeypatch)


def test_code_of_a_model_is_refused_in_words(tmp_path: Path) -> None:
    folder = own_model(tmp_path / "model", tmp_path / "mark")
    words = (
        "config.json: model_type='own' is code of its own .configuration_own.OwnConfig, modeling_own.OwnForCausalLM.; "
        "code of a model folder is not run unless the recipe says model.trust_remote_code: true"
    )
    for read in (read_model_config, load_base_model):
        with pytest.raises(ConfigError, match=words):
            read(folder)
    assert not (tmp_path / "mark").exists()


def test_code_of_a_tokenizer_is_refused_in_words(tmp_path: Path) -> None:
    folder = _own_tokenizer(tmp_path / "model", tmp_path / "mark")
    with pytest.raises(ConfigError, match="the tokenizer is code of its own .tokenization_own.OwnTokenizer.; code of"):
        load_tokenizer(folder)
    assert not (tmp_path / "mark").exists()


def test_code_runs_where_the_recipe_allows_it(tmp_path: Path) -> None:
    folder = _own_tokenizer(own_model(tmp_path / "model", tmp_path / "mark"), tmp_path / "other")
    ours = load_base_model(folder, dtype=torch.float32, load_in_4bit=False, trust_remote_code=True)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, tiny_llama()(ids).logits)
    assert type(ours).__name__ == "OwnForCausalLM" and (tmp_path / "mark").exists()
    assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "OwnTokenizer"


def test_code_that_transformers_has_too_is_not_needed(tmp_path: Path) -> None:
    """Phi-3 and others bring the files that they had before transformers knew them."""
    save_tiny_llama(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    _edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_gone.Gone"})
    _edit(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_gone.Gone", None]})
    assert type(build_empty_model(tmp_path, dtype=torch.float32)).__name__ == "LlamaForCausalLM"
    assert load_tokenizer(tmp_path).eos_token == "</s>"
    assert own_code(tmp_path) == ["modeling_gone.Gone", "tokenization_gone.Gone"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "config.json is not a JSON object"),
        ("[" * 100_000, "config.json cannot be read: it is nested more than"),
        ("{}", "model_type=None is not a model type of transformers"),
        ('{"model_type": "nothing"}', "model_type='nothing' is not a model type of transformers"),
        ('{"model_type": ["llama"]}', r"model_type=\['llama'\] is not a model type of transformers"),
        ('{"model_type": "vit"}', "model_type='vit' is not a causal language model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot read config.json"),
        ('{"model_type": "llama", "hidden_size": 48, "num_attention_heads": 0}', "transformers cannot"),
        ('{"model_type": "dots1"}', "config.json: transformers cannot build this model"),
    ],
)
def test_what_transformers_cannot_read_is_said(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        build_empty_model(tmp_path, dtype=torch.float32)
    assert str(tmp_path) in str(caught.value)


def test_what_models_of_others_write_is_read(tmp_path: Path) -> None:
    """Infinities, keys given twice, and outputs that are no objects."""
    save_tiny_llama(tmp_path)
    text = (tmp_path / "config.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "config.json").write_text(f'{text}, "a": Infinity, "b": 1, "b": 2, "return_dict": false}}')
    model = load_base_model(tmp_path, dtype=torch.float32, load_in_4bit=False)
    assert model(torch.arange(9)[None]).logits.shape == (1, 9, 61)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_sentencepiece_model_asks_for_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"a vocabulary")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, package, None)
    asked = rf'needs the package {package}: pip install "malora_dist\[sentencepiece\]"'
    with pytest.raises(ConfigError, match=asked):
        load_tokenizer(tmp_path)


def test_a_tokenizer_reads_a_text_alike_every_time(tmp_path: Path) -> None:
    """Also one that left out merges at random when its model was trained."""
    merging_tokenizer().save_pretrained(tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    rules["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    found = load_tokenizer(tmp_path)
    assert len({tuple(found("red red red")["input_ids"]) for _ in range(30)}) == 1


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}: transformers cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_every_call_says_that_no_code_runs() -> None:
    """Without the argument transformers asks, and runs the code if somebody or something answers y."""
    calls = []
    for path in (ROOT / "malora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                if node.func.attr in ("from_pretrained", "from_config") and owner.startswith("Auto"):
                    calls.append((path, node))
    assert len(calls) >= 6
    for path, node in calls:
        assert any(key.arg == "trust_remote_code" for key in node.keywords), f"{path}:{node.lineno}"
