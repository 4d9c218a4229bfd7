"""slim_wheel.py WHEEL PATTERN...: drop the files of a wheel that match a pattern, and their lines in its RECORD."""

import fnmatch
import sys
import zipfile
from pathlib import Path


def slim(wheel: Path, patterns: list[str]) -> None:
    """Write the wheel anew in its place."""
    small = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        dropped = {name for name in old.namelist() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
        for entry in old.infolist():
            if entry.filename not in dropped:
                data = old.read(entry)
                is_record = entry.filename.endswith(".dist-info/RECORD")
                new.writestr(entry, without_lines(data, dropped) if is_record else data)
    small.replace(wheel)
    print(f"{wheel.name}: {len(dropped)} files dropped, {wheel.stat().st_size / 2**20:.1f} MiB left")


def without_lines(record: bytes, dropped: set[str]) -> bytes:
    """A RECORD without the lines of some files."""
    lines = [line for line in record.decode().splitlines() if line.split(",")[0] not in dropped]
    return "".join(f"{line}\n" for line in lines).encode()


if __name__ == "__main__":
    slim(Path(sys.argv[1]), sys.argv[2:])
