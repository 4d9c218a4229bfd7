"""Every lock holds on disks with and without flock()."""

import errno
import fcntl
from pathlib import Path

import pytest
from filelock import SoftFileLock, Timeout

from malora_dist.errors import CheckpointError, ConfigError, TrainingError
from malora_dist.files.cache import build_once
from malora_dist.files.folder import new_folder
from malora_dist.files.locks import lock_at, marker
from malora_dist.training.run_folder import claim_run_folder, lock_run_folder


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=lambda code: errno.errorcode.get(code))
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of a disk whose flock() fails in this way, or works."""
    if request.param is not None:

        def refuse(*_: object) -> None:
            raise OSError(request.param, "no locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path


def test_a_run_folder_is_held(disk: Path) -> None:
    folder, lock = claim_run_folder(disk / "run")
    with pytest.raises(TrainingError, match="another process is training in it"):
        lock_run_folder(folder, seconds=0)
    other, second = claim_run_folder(disk / "run")
    assert (folder.name, other.name) == ("run", "run-2")
    lock.release()
    lock_run_folder(folder, seconds=0).release()
    second.release()


def test_a_new_folder_is_written_by_one(disk: Path) -> None:
    with new_folder(disk / "new") as folder:
        (folder / "file").touch()
        with pytest.raises(CheckpointError, match="is being written by another process"), new_folder(disk / "new"):
            raise AssertionError("not reached")
    assert [path.name for path in disk.iterdir()] == ["new"]


def test_a_cache_is_built_once(disk: Path) -> None:
    assert build_once(disk / "cache", lambda folder: (folder / "file").touch())
    assert not build_once(disk / "cache", lambda folder: pytest.fail("again"))


def test_the_end_of_a_process_ends_its_lock(disk: Path) -> None:
    lock = lock_at(disk / "lock")
    lock.acquire(timeout=0)
    with pytest.raises(Timeout):
        lock_at(disk / "lock").acquire(timeout=0)
    if isinstance(lock, SoftFileLock):
        # What another process has left that is gone.
        held = marker(disk / "lock").read_text()
        lock.release()
        marker(disk / "lock").write_text(held.replace(held.split()[0], str(2**22 - 1), 1))
        taken = lock_at(disk / "lock")
        taken.acquire(timeout=5)
        taken.release()


def test_a_place_that_cannot_be_written_is_no_missing_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        lock_at(tmp_path / "none" / "lock")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be locked"):
        lock_run_folder(tmp_path / "run", seconds=0)
