"""A copy of a base has its fingerprint, another base has not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from malora_dist.errors import ConfigError
from malora_dist.models.weights.fingerprint import base_fingerprint
from tests.training.workers import make_model


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    wanted = base_fingerprint(tmp_path / "base")
    assert len(wanted) == 32 and wanted == base_fingerprint(tmp_path / "base")
    copy = Path(shutil.copytree(tmp_path / "base", tmp_path / "copy"))
    os.utime(copy / "model.safetensors", (1, 1))
    (copy / "README.md").write_text("no part of it")
    assert base_fingerprint(copy) == wanted

    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, copy / "model.safetensors")
    assert base_fingerprint(copy) != wanted
    save_file({**tensors, "more": torch.zeros(1)}, copy / "model.safetensors")
    assert base_fingerprint(copy) != wanted
    config = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    assert base_fingerprint(tmp_path / "base") != wanted


def test_a_base_in_several_files(tmp_path: Path) -> None:
    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    first = base_fingerprint(tmp_path)
    save_file({name: tensors[name] + 1 for name in parts["model-2.safetensors"]}, tmp_path / "model-2.safetensors")
    assert base_fingerprint(tmp_path) != first
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-2.safetensors"):
        base_fingerprint(tmp_path)
