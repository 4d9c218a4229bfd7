"""Another number of files, the same checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from malora_dist.checkpoint.layout import Manifest
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.reshard import reshard
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.errors import CheckpointError
from tests.checkpoint.disks import small_disk
from tests.checkpoint.samples import save, tensors_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(CheckpointStore(tmp_path / "checkpoints"), 7, shards=3)


@pytest.mark.parametrize(("shards", "files"), [(1, 1), (2, 2), (5, 5), (1000, 12)])
def test_resharding(source: Path, tmp_path: Path, shards: int, files: int) -> None:
    target = reshard(source, tmp_path / "new" / "x", shards)
    assert target == tmp_path / "new" / "x" and [path.name for path in target.parent.iterdir()] == ["x"]
    checkpoint, before = Checkpoint.open(target), Manifest.read(source)
    checkpoint.verify()
    assert len(set(checkpoint.manifest.tensors["adapter"].values())) == files
    assert {path.name for path in target.iterdir()} == {"manifest.json", *checkpoint.manifest.files}
    assert replace(checkpoint.manifest, files=before.files, tensors=before.tensors) == before
    for kind, tensors in tensors_of(7).items():
        assert checkpoint.names(kind) == list(before.tensors[kind])
        assert all(torch.equal(checkpoint.read(kind, name), tensor) for name, tensor in tensors.items())
    for file in ("rng.safetensors", "adapter_config.json"):
        assert checkpoint.manifest.files[file] == before.files[file]
        assert (target / file).read_bytes() == (source / file).read_bytes()


def test_there_and_back_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    three = reshard(source, tmp_path / "three", 3)
    back = reshard(reshard(three, tmp_path / "one", 1), tmp_path / "step-000007", 3)
    assert (back / "manifest.json").read_bytes() == (three / "manifest.json").read_bytes()
    Checkpoint.open(back).verify()


def test_without_moments(tmp_path: Path) -> None:
    source = save(CheckpointStore(tmp_path), 7, tensors_of(7) | {"optimizer": {}}, shards=1)
    checkpoint = Checkpoint.open(reshard(source, tmp_path / "x", 2))
    assert checkpoint.names("optimizer") == [] and len(checkpoint.names("adapter")) == 12


@pytest.mark.parametrize("case", ["damage", "exists", "link", "zero", "step", "nothing"])
def test_what_is_refused(source: Path, tmp_path: Path, case: str) -> None:
    target, shards, words = tmp_path / "target", 2, ""
    if case == "damage":
        shard = source / "optimizer-00003-of-00003.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        words = f"{shard} is damaged: its SHA-256 is"
    elif case == "exists":
        target.mkdir()
        words = f"{target} exists"
    elif case == "link":
        target.symlink_to("nowhere")
        words = f"{target} exists"
    elif case == "zero":
        shards, words = 0, "shards=0 must be at least 1"
    elif case == "step":
        target, words = tmp_path / "step-000008", "is of step 7"
    else:
        source, words = tmp_path / "nothing", f"{tmp_path / 'nothing'} is not a checkpoint"
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=words):
        reshard(source, target, shards)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert not target.is_dir() or not list(target.iterdir())


@pytest.mark.e2e
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        for pages in range(100):
            disk.leave(pages)
            try:
                target = reshard(source, disk.folder / "x", 2)
                break
            except CheckpointError as error:
                assert f"cannot be written: {disk.reason}" in str(error)
                assert not [path for path in disk.folder.iterdir() if "x" in path.name]
        assert pages >= 2
        Checkpoint.open(target).verify()
    Checkpoint.open(source).verify()
