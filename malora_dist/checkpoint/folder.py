"""Folders that appear whole or not at all, and files that stay inside theirs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from malora_dist.atomic import to_disk
from malora_dist.checkpoint.disk import remove, writing
from malora_dist.errors import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside `target`, which becomes `target` when the block ends without an error.

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
    """The empty folder `partial`, locked: the lock ends with the process, so a leftover is known from one in use."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial} is being written by another process") from None
        for path in partial.iterdir():
            remove(path)
        yield
    finally:
        os.close(descriptor)


def file_in(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder. Raises CheckpointError if there is none, or if a link leaves the folder."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link to {path.resolve()}, outside its folder; put the file itself there")
    return path
