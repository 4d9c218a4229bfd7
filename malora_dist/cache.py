"""Where converted models and tokenised tasks are kept between runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def default_cache_dir() -> Path:
    """$MALORA_CACHE, or ~/.cache/malora_dist."""
    return Path(os.environ.get("MALORA_CACHE", "~/.cache/malora_dist")).expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Let `build` fill an empty folder that then becomes `folder`, unless that exists; whether it was built now.

    Of many processes one builds, under a lock that a killed process releases. A folder is whole and on disk, or not
    there, and is never changed. Raises OSError if it cannot be written.
    """
    if folder.is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return False
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            build(partial)
            for path in [*partial.iterdir(), partial]:
                _to_disk(path)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _to_disk(folder.parent)
    return True


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
