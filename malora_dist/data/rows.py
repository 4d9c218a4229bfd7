"""Rows of a task's files, each with the place it came from: JSONL, JSON, CSV and Parquet."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from malora_dist.data.json_rows import read_json_lines, read_json_list
from malora_dist.data.row import Row
from malora_dist.data.table_rows import read_csv, read_parquet
from malora_dist.errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def find_files(patterns: Sequence[str], *, task: str) -> list[Path]:
    """Find the files that paths and globs name, in the order given, those of one glob sorted.

    Raises DataError for a file that is missing, empty, of an unknown kind or that cannot be opened, or a glob that
    matches nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        # A home that is not known stays as it is written.
        files += _matches(os.path.expanduser(pattern), task)
    for path in files:
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"task {task!r}: {path}: unknown kind of file; known are {', '.join(FORMATS)}")
        _check_content(path, task)
    return list(dict.fromkeys(files))


def _check_content(path: Path, task: str) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"task {task!r}: {path}: cannot be read: {error.strerror}") from error
    if empty:
        raise DataError(f"task {task!r}: {path}: the file is empty")


def read_rows(path: Path) -> Iterator[Row]:
    """Read all rows of one file, bad ones included. Raises DataError if the file as a whole cannot be read."""
    return _READERS[path.suffix.lower()](path)


def _matches(pattern: str, task: str) -> list[Path]:
    try:
        return _existing(pattern, task)
    except OSError as error:
        raise DataError(f"task {task!r}: {pattern}: cannot be read: {error.strerror}") from error


def _existing(pattern: str, task: str) -> list[Path]:
    # A name with brackets may be a plain file, so the literal reading comes first.
    if Path(pattern).is_file():
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        is_folder = Path(pattern).is_dir()
        what = (
            "is a folder; name its files, for example with *.jsonl" if is_folder else f"no such file{_place(pattern)}"
        )
        raise DataError(f"task {task!r}: {pattern}: {what}")
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise DataError(f"task {task!r}: {pattern}: no file matches this pattern{_place(pattern)}")
    return found


def _place(path: str) -> str:
    """Return where a relative path begins, which is not where the recipe is."""
    return "" if Path(path).is_absolute() else f" (relative to {Path.cwd()}, the folder that the command runs in)"


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_list,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
