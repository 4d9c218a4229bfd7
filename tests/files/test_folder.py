"""A folder appears whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from malora_dist.errors import CheckpointError
from malora_dist.files.folder import file_in, new_folder
from tests.checkpoint.disks import small_disk
from tests.multiprocess import ROOT


def test_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "inner" / "file").read_text() == "x"
    assert {path.name for path in target.parent.iterdir()} == {"new"}
    with pytest.raises(CheckpointError, match="new exists: nothing is overwritten"), new_folder(target):
        raise AssertionError("not reached")
    other = target.with_name("other")
    with pytest.raises(ZeroDivisionError), new_folder(other) as folder:
        (folder / "file").write_text("x")
        _ = 1 / 0
    assert {path.name for path in target.parent.iterdir()} == {"new"}


def test_a_link_to_nowhere_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link exists"), new_folder(tmp_path / "link"):
        raise AssertionError("not reached")


WRITER = """
import os, signal, sys
from pathlib import Path
from malora_dist.files.folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.e2e
def test_leftovers_of_the_killed_and_work_of_the_living(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, target], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        with pytest.raises(CheckpointError, match=".new.partial is being written by another process"):
            with new_folder(target):
                raise AssertionError("not reached")
        assert (tmp_path / ".new.partial" / "file").read_text() == "half"
        writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert (tmp_path / ".new.partial" / "file").exists() and not target.exists()
    with new_folder(target) as folder:
        assert not list(folder.iterdir())
    assert target.is_dir() and not (tmp_path / ".new.partial").exists()


@pytest.mark.e2e
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            with new_folder(tmp_path / "disk" / "new") as folder:
                (folder / "file").write_bytes(bytes(2**21))
        assert not list((tmp_path / "disk").iterdir())


def test_files_stay_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    (folder / "inside").symlink_to("file")
    (tmp_path / "outside").touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    assert file_in(folder, "file") and file_in(folder, "inside")
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0a" * 20)
    (snapshot / "sub").mkdir(parents=True)
    for blobs in (snapshot.parents[1] / "blobs", tmp_path / "hub" / "models--c--d" / "blobs"):
        blobs.mkdir(parents=True)
        (blobs / "f00d").touch()
        for place in (snapshot, snapshot / "sub"):
            (place / blobs.parent.name).symlink_to(os.path.relpath(blobs / "f00d", place))
    # As the hub's cache leaves a repository's files; those of another one are outside.
    assert file_in(snapshot, "models--a--b") and file_in(snapshot / "sub", "models--a--b")
    for place in (snapshot, snapshot / "sub"):
        with pytest.raises(CheckpointError, match="outside its folder"):
            file_in(place, "models--c--d")
    with pytest.raises(CheckpointError, match="outside its folder"):
        file_in(folder, "link")
    for name in ("none", "pipe"):
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            file_in(folder, name)
