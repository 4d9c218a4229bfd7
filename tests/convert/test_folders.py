"""Adapter folders and checkpoints keep every bit on their way."""

import shutil
from pathlib import Path

import pytest
import torch

from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.errors import CheckpointError, ConfigError
from tests.convert.made import base, logits, make_checkpoint, run_kind, token_rows
from tests.e2e import files


@pytest.fixture(scope="module")
def checkpoint(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("checkpointed") / "run"
    shutil.copytree(workspace / "runs" / "malora", run)
    return make_checkpoint(run)


def same(found: Path, wanted: Path) -> bool:
    a, b = open_adapter(found), open_adapter(wanted)
    assert a.info == b.info and a.shapes == b.shapes
    return all(torch.equal(a.read(name), b.read(name)) for name in b.shapes)


@pytest.mark.parametrize("method", ["malora", "lora"])
def test_adapter_folder_of_a_run(workspace: Path, tmp_path: Path, method: str) -> None:
    run = workspace / "runs" / method
    said = run_kind("adapter", run, tmp_path / "new" / "out", verify=True)
    assert "max |d logits| 0.0e+00" in said[0] and "max |d weight| 0.0e+00" in said[0]
    assert said[-1] == f"wrote {tmp_path / 'new' / 'out'}"
    assert same(tmp_path / "new" / "out", run / "adapter")
    assert files(tmp_path) == {f"new/out/{name}" for name in files(run / "adapter")}
    assert (tmp_path / "new" / "out" / "README.md").read_text() == "# the card of the run\n"


def test_adapter_folder_of_a_checkpoint(workspace: Path, checkpoint: Path, tmp_path: Path) -> None:
    run_kind("adapter", checkpoint, tmp_path / "out")
    assert "Trained on colour, animal, spell" in (tmp_path / "out" / "README.md").read_text()
    assert same(tmp_path / "out", workspace / "runs" / "malora")
    one, other = base(workspace), base(workspace)
    load_adapter(one, checkpoint)
    load_adapter(other, tmp_path / "out")
    assert torch.equal(logits(one, token_rows()), logits(other, token_rows()))


def test_a_run_without_a_finished_adapter_is_its_newest_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint.parents[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert open_adapter(tmp_path / "run").path == tmp_path / "run" / "checkpoints" / checkpoint.name
    run_kind("adapter", tmp_path / "run", tmp_path / "out")
    assert same(tmp_path / "out", checkpoint)


def test_checkpoint_in_more_files_and_back(checkpoint: Path, tmp_path: Path) -> None:
    said = run_kind("checkpoint", checkpoint, tmp_path / "three", shards=3, verify=True)
    assert "72 tensors are equal bit for bit" in said[0], "24 of the adapter, two moments each"
    run_kind("checkpoint", tmp_path / "three", tmp_path / "one", shards=1)
    assert len(list((tmp_path / "three").glob("*-of-00003.safetensors"))) == 6
    assert files(tmp_path / "one") == files(checkpoint)
    assert Checkpoint.open(tmp_path / "one").manifest == Checkpoint.open(checkpoint).manifest
    Checkpoint.open(tmp_path / "three").verify()


def test_checkpoint_needs_a_checkpoint_and_shards(workspace: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --shards N"):
        run_kind("checkpoint", checkpoint, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run_kind("checkpoint", workspace / "runs" / "malora" / "adapter", tmp_path / "out", shards=2)
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "step-000007")
    file = tmp_path / "step-000007" / "adapter-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter-00001-of-00001.safetensors is damaged: its SHA-256"):
        run_kind("adapter", tmp_path / "step-000007", tmp_path / "out")
    assert not (tmp_path / "out").exists()
