"""Disks that are full or forbidden, really."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096
UNPRIVILEGED = 65534


class SmallDisk:
    """A folder on a disk of which `leave` says how much can still be written: a small tmpfs."""

    reason = "No space left on device"
    # Whether each of several writes is the one that fails, at one limit or another.
    one_by_one = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def leave(self, pages: int | None) -> None:
        """Fill the disk but for so many pages; None empties it of what was put there."""
        self._filler.unlink(missing_ok=True)
        if pages is None:
            return
        status = os.statvfs(self.folder)
        used = (status.f_bavail * status.f_frsize // PAGE - pages) * PAGE
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, used))


class SmallFiles(SmallDisk):
    """Where nothing may be mounted: no file of this process may grow beyond so many pages."""

    reason = "File too large"
    one_by_one = False

    def leave(self, pages: int | None) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        soft = hard if pages is None else pages * PAGE
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size: int = 2**20) -> Iterator[SmallDisk]:
    """A tmpfs of `size` bytes mounted on a new folder, or a limit on files where mounting is not permitted."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    disk = SmallFiles(folder) if mount.returncode else SmallDisk(folder)
    try:
        yield disk
    finally:
        disk.leave(None)
        if not mount.returncode:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """Nobody may write into the folder, and this process is nobody special."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)
