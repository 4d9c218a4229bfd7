"""Rows of a task's files, each with the place it came from: JSONL, JSON, CSV and Parquet."""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
REPLACED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Row:
    """One row as read. `problem` says why it could not be read; `fields` is then empty."""

    source: str
    fields: dict[str, Any]
    problem: str | None = None


def find_files(patterns: Sequence[str], *, task: str) -> list[Path]:
    """The files that paths and globs name, in the order given, those of one glob sorted.

    Raises DataError for a file that is missing or empty, of an unknown kind, or a glob that matches nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        files += _matches(str(Path(pattern).expanduser()), task)
    for path in files:
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"task {task!r}: {path}: unknown kind of file; known are {', '.join(FORMATS)}")
        if path.stat().st_size == 0:
            raise DataError(f"task {task!r}: {path}: the file is empty")
    return list(dict.fromkeys(files))


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of one file, bad ones included. Raises DataError if the file as a whole cannot be read."""
    return _READERS[path.suffix.lower()](path)


def _matches(pattern: str, task: str) -> list[Path]:
    # A name with brackets may be a plain file, so the literal reading comes first.
    if Path(pattern).is_file():
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        kind = "is a folder; name its files, for example with *.jsonl" if Path(pattern).is_dir() else "no such file"
        raise DataError(f"task {task!r}: {pattern}: {kind}")
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise DataError(f"task {task!r}: {pattern}: no file matches this pattern")
    return found


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Line by line rather than through `datasets`, which names neither the line nor the field of a bad row.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(f"{path}:{number}", line)


def _json_row(source: str, line: bytes) -> Row:
    try:
        return _object_row(source, json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Row(source, {}, f"invalid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Row(source, {}, f"not JSON: {error.msg} at column {error.colno}")


def _object_row(source: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(source, value)
    return Row(source, {}, f"must be an object with fields, is {type(value).__name__}")


def _read_json(path: Path) -> Iterator[Row]:
    # Not through `datasets` either: one column may hold both 1 and "B" as labels, which Arrow refuses.
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{path}:{_first_invalid_line(path)}: invalid UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a list of objects, is {type(values).__name__} (one object a line: .jsonl)")
    for number, value in enumerate(values, start=1):
        yield _object_row(f"{path}: row {number}", value)


def _read_csv(path: Path) -> Iterator[Row]:
    # A broken byte is replaced while reading, so that its row alone is bad; a clean file may hold that character.
    damaged = _first_invalid_line(path) is not None
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    options = {"sep": separator, "keep_default_na": False, "encoding_errors": "replace", "encoding": "utf-8-sig"}
    for row in _read_with_datasets("csv", path, **options, features=_text_columns(path, separator)):
        bad = damaged and any(isinstance(value, str) and REPLACED in value for value in row.fields.values())
        yield Row(row.source, {}, "invalid UTF-8") if bad else row


def _text_columns(path: Path, separator: str) -> Any:
    # Without this, pandas would turn a prompt "007" into the number 7.
    import csv

    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    return Features({name: Value("string") for name in header})


def _read_parquet(path: Path) -> Iterator[Row]:
    return _read_with_datasets("parquet", path)


def _read_with_datasets(kind: str, path: Path, **options: Any) -> Iterator[Row]:
    # Imported late: it takes seconds, and JSONL files do not need it.
    from datasets import load_dataset

    try:
        # Streaming: without it `datasets` writes a second copy of the rows to its own cache.
        escaped = glob.escape(str(path.resolve()))
        rows = load_dataset(kind, data_files=escaped, split="train", streaming=True, **options)
        for number, fields in enumerate(rows, start=1):
            yield Row(f"{path}: row {number}", dict(fields))
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {kind}: {cause}") from error


def _first_invalid_line(path: Path) -> int | None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
