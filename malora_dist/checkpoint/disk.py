"""Files that are on disk when a call returns, and the system's refusals in words."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from malora_dist.cache import to_disk
from malora_dist.errors import CheckpointError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError with the path and the system's reason."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError with the path and the system's reason."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


def share_file(path: Path) -> None:
    """Let those who may read the folder read the file, and put its bytes on disk. Raises OSError."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    to_disk(path)


def write_text(path: Path, text: str) -> None:
    """Write a file, or replace it whole. Its name is on disk only once its folder is. Raises CheckpointError."""
    partial = path.with_name(partial_name(path.name))
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        share_file(partial)
        partial.replace(path)


def partial_name(name: str) -> str:
    """Under what name the file or folder `name` is written."""
    return f".{name}.partial"


def remove(path: Path) -> None:
    """Delete a file, link or folder as far as the system allows; what remains is found again by its name."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
