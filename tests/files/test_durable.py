"""Full disks and folders without permission: an error with the reason, and finished checkpoints as they were."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from malora_dist.checkpoint.layout import MANIFEST
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.errors import CheckpointError
from malora_dist.files.durable import remove, write_text
from tests.checkpoint.disks import SmallDisk, forbidden, small_disk
from tests.checkpoint.samples import check_tensors, manifest_of, save, tensors_of, write_files

WRITES = {"adapter_config.json", "adapter", "optimizer", "rng.safetensors", ".latest.partial", "manifest.json"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.e2e
def test_a_disk_that_is_full_at_any_moment(disk: SmallDisk) -> None:
    """Page by page more is left, so that each write of a save is once the one that fails."""
    store = CheckpointStore(disk.folder / "checkpoints", 1)
    save(store, 1)
    store.mark_best(1)
    failed: Counter[str] = Counter()
    for pages in range(100):
        disk.leave(pages)
        try:
            save(store, 2)
        except CheckpointError as error:
            assert f"cannot be written: {disk.reason}" in str(error) and str(store.folder) in str(error)
            failed[Path(str(error).split(" cannot")[0]).name.split("-")[0]] += 1
            store.discard(2)
            assert not list(store.folder.glob(".step-*"))
            assert store.steps() == [1] and store.best() == store.latest() == store.folder / "step-000001"
            check_tensors(store.folder / "step-000001", tensors_of(1))
        else:
            break
    assert set(failed) == WRITES if disk.one_by_one else len(failed) > 2, failed
    check_tensors(store.folder / "step-000002", tensors_of(2))
    assert store.steps() == [1, 2]
    disk.leave(None)
    save(store, 3)
    assert store.steps() == [1, 3]


@pytest.mark.e2e
def test_a_disk_that_is_full_when_the_best_moves(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.folder / "checkpoints")
    for step in (1, 2):
        save(store, step)
    store.mark_best(1)
    disk.leave(0)
    with pytest.raises(CheckpointError, match=f"best.*cannot be written: {disk.reason}"):
        store.mark_best(2)
    assert store.best() == store.folder / "step-000001"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_folder_without_permission(open_folder: Path) -> None:
    with forbidden(open_folder):
        with pytest.raises(
            CheckpointError, match=f"{open_folder / 'checkpoints'} cannot be written: Permission denied"
        ):
            CheckpointStore(open_folder / "checkpoints").begin(1)
    store = CheckpointStore(open_folder / "checkpoints", 1)
    save(store, 1)
    with forbidden(store.folder):
        with pytest.raises(CheckpointError, match=".step-000002.partial cannot be written: Permission denied"):
            store.begin(2)
        with pytest.raises(CheckpointError, match="best.*cannot be written: Permission denied"):
            store.mark_best(1)
        assert store.latest() == store.folder / "step-000001"
        check_tensors(store.folder / "step-000001", tensors_of(1))
    partial = store.begin(2)
    manifest = manifest_of(2, *write_files(partial, tensors_of(2), 2))
    with forbidden(store.folder):
        with pytest.raises(CheckpointError, match="latest.*cannot be written: Permission denied"):
            store.commit(2, manifest)
        store.discard(2)
        assert store.steps() == [1] and partial.exists()
        check_tensors(store.folder / "step-000001", tensors_of(1))
    save(store, 2)
    assert store.steps() == [2]


def test_a_checkpoint_that_may_not_be_read(open_folder: Path) -> None:
    folder = save(CheckpointStore(open_folder), 1)
    shard = folder / "adapter-00001-of-00002.safetensors"
    for path in (shard, folder / MANIFEST, folder):
        mode = path.stat().st_mode
        path.chmod(0)
        with (
            forbidden(open_folder),
            pytest.raises(CheckpointError, match=f"{path}.* cannot be read: Permission denied"),
        ):
            Checkpoint.open(folder)
        path.chmod(mode)
    with forbidden(open_folder):
        check_tensors(folder, tensors_of(1))


@pytest.mark.e2e
def test_a_text_is_replaced_whole_or_not_at_all(disk: SmallDisk) -> None:
    path = disk.folder / "text"
    write_text(path, "former")
    disk.leave(1)
    with pytest.raises(CheckpointError, match=f"text.*cannot be written: {disk.reason}"):
        write_text(path, "x" * 10_000)
    assert path.read_text() == "former"
    disk.leave(None)
    write_text(path, "new")
    assert path.read_text() == "new"


def test_what_can_be_removed_is_removed(open_folder: Path) -> None:
    inside, outside = open_folder / "inside", open_folder / "outside"
    for folder in (inside, outside):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").touch()
    (inside / "link").symlink_to(outside)
    with forbidden(open_folder):
        remove(inside)
    assert inside.is_dir()
    for path in (inside, open_folder / "absent"):
        remove(path)
    assert [path.name for path in open_folder.iterdir()] == ["outside"] and (outside / "deep" / "file").exists()
