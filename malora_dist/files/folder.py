"""Folders that appear whole or not at all, and files that stay inside theirs."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from malora_dist.errors import CheckpointError
from malora_dist.files.atomic import to_disk
from malora_dist.files.durable import remove, writing
from malora_dist.files.locks import lock_at, marker

COMMIT = re.compile("[0-9a-f]{40}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `target`, which becomes `target` when the block ends without an error.

    Its files are on disk before the rename. An error removes it; what a killed process left is removed by the next one
    that writes the same target. Raises CheckpointError if `target` exists, cannot be written, or is being written now.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists: nothing is overwritten, give a new name")
    partial = target.with_name(f".{target.name}.partial")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                yield partial
                for path in [*partial.rglob("*"), partial]:
                    to_disk(path)
                partial.rename(target)
            finally:
                remove(partial)
        to_disk(target.parent)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the empty folder `partial`, locked within the block.

    The lock ends with the process, so a leftover is known from one in use.
    """
    path = partial.with_name(f"{partial.name}.lock")
    lock = lock_at(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        left = f"; if one of another host was killed, remove {marker(path)}" if marker(path).exists() else ""
        raise CheckpointError(f"{partial} is being written by another process{left}") from None
    try:
        partial.mkdir(exist_ok=True)
        for leftover in partial.iterdir():
            remove(leftover)
        yield
    finally:
        # While it is held: whoever has opened it meanwhile finds that it is gone, and makes another.
        remove(path)
        lock.release()


def file_in(folder: Path, name: str) -> Path:
    """Return the path of the regular file `name` of a folder.

    Raises CheckpointError if there is none, or if a link leaves the folder.

    In the hub's cache a file is a link from `snapshots/<commit>` to `blobs` of the same repository.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    file, places = path.resolve(), [folder.resolve(), *_blobs(folder.resolve())]
    if not any(file.is_relative_to(place) for place in places):
        raise CheckpointError(f"{path} is a link to {file}, outside its folder; put the file itself there")
    return path


def is_cached(path: Path) -> bool:
    """Return whether this is a file of the hub's cache: a link from `snapshots/<commit>` to `blobs` beside those."""
    if not path.is_symlink() or not path.is_file():
        return False
    return any(path.resolve().is_relative_to(blobs) for blobs in _blobs(path.parent.resolve()))


def local_path(name: str) -> Path:
    """Return the path that a model's name means if it is one; `~` stands for the home folder where that is known.

    Examine it with os.path: its functions return False for what cannot be a path, where Path's own methods raise.
    """
    return Path(os.path.expanduser(name))


def _blobs(folder: Path) -> Iterator[Path]:
    """Yield where the files of a repository in the hub's cache lie, if the folder is, or is in, a snapshot of one."""
    for commit in (folder, *folder.parents):
        if commit.parent.name == "snapshots" and COMMIT.fullmatch(commit.name):
            yield commit.parent.parent / "blobs"
