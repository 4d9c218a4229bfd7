"""Files that are on disk when a call returns, and the system's refusals in words."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from malora_dist.errors import CheckpointError
from malora_dist.files import atomic


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


def write_text(path: Path, text: str) -> None:
    """Write a file, or replace it whole. Raises CheckpointError."""
    with writing(path):
        atomic.write_text(path, text)


def remove(path: Path) -> None:
    """Delete a file, link or folder as far as the system allows; what remains is found again by its name."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
