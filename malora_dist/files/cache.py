"""Where converted models and tokenised tasks are kept between runs."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, Timeout

from malora_dist.errors import ConfigError, short
from malora_dist.files.atomic import to_disk
from malora_dist.files.locks import lock_at

WAIT_SECONDS = 0.3


def default_cache_dir() -> Path:
    """Return $MALORA_CACHE, or ~/.cache/malora_dist. Raises ConfigError as `expanded`."""
    return expanded("MALORA_CACHE", os.environ.get("MALORA_CACHE", "~/.cache/malora_dist"))


def expanded(key: str, path: str) -> Path:
    """Replace `~` in a path by the home folder. Raises ConfigError, naming `key`, if that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={short(path)}: the home folder of that user is not known on this machine") from error


def build_once(folder: Path, build: Callable[[Path], None], poll: Callable[[], None] = lambda: None) -> bool:
    """Let `build` fill an empty folder that then becomes `folder`, unless that exists; return whether it was built now.

    Of many processes one builds, under a lock that a killed process releases. A folder is whole and on disk, or not
    there, and is never changed. `poll` is called several times a second while another process builds; what it
    raises ends the wait. Raises OSError if it cannot be written.
    """
    if folder.is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _held(lock_at(Path(f"{folder}.lock")), poll):
        if folder.is_dir():
            return False
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            build(partial)
            for path in [*partial.iterdir(), partial]:
                to_disk(path)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        to_disk(folder.parent)
    return True


@contextmanager
def _held(lock: BaseFileLock, poll: Callable[[], None]) -> Iterator[None]:
    while True:
        try:
            lock.acquire(timeout=WAIT_SECONDS)
            break
        except Timeout:
            poll()
    try:
        yield
    finally:
        lock.release()
