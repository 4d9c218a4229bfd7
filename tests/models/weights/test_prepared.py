"""The prepared base: the same model as without it, never a stale one, never half of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from malora_dist.errors import ConfigError
from malora_dist.models.load import base_tensors, build_empty_model, load_base_model
from malora_dist.models.weights.base_tensor import BaseTensor
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.prepared import PreparedWeights, prepared_folder, write_prepared
from tests.tiny_models import save_tiny_llama

BF16 = {"dtype": torch.bfloat16, "double_quant": False}


def _tensors(model: Path, double_quant: bool = False) -> list[BaseTensor]:
    empty = build_empty_model(model, dtype=torch.bfloat16)
    return list(dict.fromkeys(base_tensors(empty, load_in_4bit=True, double_quant=double_quant).values()))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "model", attention_bias=True, tie_word_embeddings=True, max_shard_size="20KB")
    return tmp_path / "model"


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_is_the_model_read_and_quantised(model: Path, tmp_path: Path, double_quant: bool) -> None:
    folder, identity = prepared_folder(model, dtype=torch.bfloat16, double_quant=double_quant, cache_dir=tmp_path)
    tensors = _tensors(model, double_quant)
    steps: list[None] = []
    options: dict[str, Any] = {"file_bytes": 10_000, "advance": lambda: steps.append(None)}
    assert write_prepared(folder, identity, tensors, CheckpointWeights(model), **options)
    assert len(steps) == len(tensors)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 15_000 for file in files)
    weights = PreparedWeights(folder)
    ours = load_base_model(model, weights=weights, double_quant=double_quant)
    theirs = load_base_model(model, double_quant=double_quant)
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    assert all(name == other and torch.equal(a, b) and a.dtype == b.dtype for (name, a), (other, b) in pairs)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert not write_prepared(folder, identity, tensors, CheckpointWeights(model))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def _same_time_and_size(path: Path, change: Callable[[bytes], bytes]) -> None:
    status, content = path.stat(), path.read_bytes()
    changed = change(content)
    assert len(changed) == len(content) and changed != content
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _shard(model: Path) -> Path:
    return min(model.glob("*.safetensors"))


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda model: os.utime(_shard(model)),
    "other content, same time": lambda model: _same_time_and_size(
        _shard(model), lambda content: content[:-4000] + bytes(byte ^ 1 for byte in content[-4000:])
    ),
    "other header, same time": lambda model: _same_time_and_size(
        _shard(model), lambda content: content.replace(b"embed", b"embeD")
    ),
    "longer": lambda model: _shard(model).write_bytes(_shard(model).read_bytes() + b"0"),
    "config": lambda model: (model / "config.json").write_text((model / "config.json").read_text() + " "),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_changed_model_is_another(model: Path, change: str) -> None:
    before = prepared_folder(model, **BF16)
    assert prepared_folder(model, **BF16) == before
    CHANGES[change](model)
    assert prepared_folder(model, **BF16)[0] != before[0]


def test_settings_and_versions_make_another(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {prepared_folder(model, **BF16)[0]}
    folders.add(prepared_folder(model, dtype=torch.float32, double_quant=False)[0])
    folders.add(prepared_folder(model, dtype=torch.bfloat16, double_quant=True)[0])
    monkeypatch.setattr("malora_dist.models.weights.prepared.version", lambda name: "0.1")
    folders.add(prepared_folder(model, **BF16)[0])
    monkeypatch.setattr("malora_dist.models.weights.prepared.QUANTIZER", "another")
    folders.add(prepared_folder(model, **BF16)[0])
    monkeypatch.setattr("malora_dist.models.weights.prepared.FORMAT_VERSION", 99)
    folders.add(prepared_folder(model, **BF16)[0])
    assert len(folders) == 6


def test_files_of_the_hubs_cache_are_known_by_their_content(model: Path, tmp_path: Path) -> None:
    """Downloaded at another time or place, a model is the same; another blob is another model."""
    folders = []
    for place, digit in (("a", "1"), ("b", "1"), ("c", "2")):
        root = tmp_path / place / "models--org--tiny"
        snapshot = root / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir()
        for number, file in enumerate(sorted(model.iterdir())):
            blob = root / "blobs" / (digit * 60 + f"{number:04d}")
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blob)
        folders.append(prepared_folder(snapshot, **BF16)[0])
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].name.startswith("tiny-nf4-")


def test_nothing_is_left_of_a_failure(model: Path, tmp_path: Path) -> None:
    _shard(model).unlink()
    tensors = _tensors(model)
    with pytest.raises(ConfigError, match=f"{_shard(model).name[:10]}.* is missing or damaged"):
        prepared_folder(model, **BF16)
    folder = tmp_path / "cache" / "folder"
    with pytest.raises(ConfigError, match="is missing or damaged"):
        write_prepared(folder, {}, tensors, CheckpointWeights(model))
    assert [path.name for path in folder.parent.iterdir()] == ["folder.lock"]


def test_a_cache_that_cannot_be_written_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MALORA_CACHE: .*file.* cannot be written"):
        write_prepared(tmp_path / "file" / "folder", {}, _tensors(model), CheckpointWeights(model))


def test_a_folder_that_holds_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    folder, identity = prepared_folder(model, **BF16, cache_dir=tmp_path)
    write_prepared(folder, identity, _tensors(model), CheckpointWeights(model))
    with pytest.raises(ConfigError, match="blob is torch.uint8 .* remove that folder and run `malora prepare` again"):
        load_base_model(model, weights=PreparedWeights(folder), double_quant=True)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{file.name} is missing or damaged"):
        load_base_model(model, weights=PreparedWeights(folder))


def test_one_tensor_is_in_memory_at_a_time(model: Path, tmp_path: Path) -> None:
    """Each value is let go before the next is asked for."""
    alive: list[Any] = []

    class Watched(CheckpointWeights):
        def read(self, tensor: BaseTensor) -> torch.Tensor:
            import weakref

            assert not any(reference() is not None for reference in alive[:-1])
            value = super().read(tensor)
            alive.append(weakref.ref(value))
            return value

    write_prepared(tmp_path / "folder", {}, _tensors(model), Watched(model))
    assert len(alive) == len(_tensors(model))
    assert not isinstance(alive[0](), nn.Parameter)
