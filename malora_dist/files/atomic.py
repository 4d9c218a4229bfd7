"""Files that are whole or not there, and on disk when a call returns."""

import json
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file, or replace it whole; readable for those who may read its folder. Raises OSError.

    Its name is on disk only once its folder is.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes as `write_text` writes a text. Raises OSError."""
    partial = path.with_name(partial_name(path.name))
    partial.write_bytes(content)
    share_file(partial)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with `write_text`. Raises OSError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_writable(folder: Path) -> None:
    """Make a file in a folder, and remove it. Raises OSError if that is not possible."""
    with TemporaryFile(dir=folder):
        pass


def partial_name(name: str) -> str:
    """Return the name under which the file or folder `name` is written."""
    return f".{name}.partial"


def share_file(path: Path) -> None:
    """Let those who may read the folder read the file, and put its bytes on disk. Raises OSError."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    to_disk(path)


def to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
