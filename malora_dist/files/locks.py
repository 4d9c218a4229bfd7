"""Locks between processes, also where the disk knows no flock(), as Lustre without its option and some FUSE mounts."""

import errno
import fcntl
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

# How systems say that a disk has no locks.
NONE_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def lock_at(path: Path) -> BaseFileLock:
    """Return a lock that processes hold by the file `path`; it ends with its process.

    Without flock() the lock is a file beside it that names host and process. One whose process is gone from this host
    is taken over; one of another host stays until it is removed by hand. Raises OSError if neither can be written.
    """
    return FileLock(path) if _has_flock(path) else SoftFileLock(marker(path))


def marker(path: Path) -> Path:
    """Return the file whose existence is the lock where there is no flock()."""
    return path.with_name(f"{path.name}ed")


def _has_flock(path: Path) -> bool:
    """Return whether the disk of this file has locks. Raises OSError if it cannot be written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NONE_HERE:
            return False
        # It is held, or refused as it will be again.
    finally:
        os.close(descriptor)
    return True
