"""Rows out of tables: CSV, TSV and Parquet. A row that does not fit the table is a bad row and moves no other."""

import csv
import glob
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from malora_dist.data.row import Row, Unreadable, broken_character
from malora_dist.errors import DataError, short
from malora_dist.files.json_text import key_given_twice

ROWS_AT_ONCE = 1000


def read_csv(path: Path) -> Iterator[Row]:
    """Read all rows of a CSV or TSV table, every cell as text. Raises DataError if the first line names no columns.

    Columns without a name, such as the row numbers that pandas writes, are left out.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # A broken byte becomes a character that no text holds, so that its row alone is bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _cells_of_any_length():
        reader = csv.reader(file, delimiter=separator, strict=True)
        names: list[str] | None = None
        number = 0
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if names is None:
                    raise DataError(f"{path}:{line}: cannot be read as a table: {error}") from None
                number += 1
                yield Row(f"{path}: row {number}", {}, f"cannot be read, from line {line} on: {error}")
                continue
            if _is_blank(cells):
                continue
            if names is None:
                names = _column_names(path, line, cells)
                continue
            number += 1
            yield _table_row(f"{path}: row {number}", names, cells)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _is_blank(cells: Sequence[str]) -> bool:
    return not cells or (len(cells) == 1 and not cells[0].strip())


def _column_names(path: Path, line: int, cells: Sequence[str]) -> list[str]:
    named = [name for name in cells if name.strip()]
    if not named:
        raise DataError(f"{path}:{line}: the first line must name the columns, all its {len(cells)} cells are empty")
    if broken_character("".join(cells)) is not None:
        raise DataError(f"{path}:{line}: invalid UTF-8 in the names of the columns")
    _refuse_twice(path, named)
    return list(cells)


def _refuse_twice(path: Path, names: Sequence[str]) -> None:
    twice = key_given_twice((name, None) for name in names)
    if twice is not None:
        raise DataError(f"{path}: two columns have the name {short(twice)}")


def _table_row(source: str, names: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(names):
        return Row(source, {}, f"has {len(cells)} cells where the first line names {len(names)} columns")
    if broken_character("".join(cells)) is not None:
        return Row(source, {}, "invalid UTF-8")
    return Row(source, {name: cell for name, cell in zip(names, cells, strict=True) if name.strip()})


def read_parquet(path: Path) -> Iterator[Row]:
    """Read all rows of a Parquet file. Raises DataError if it is none.

    Values in a column that cannot be read, and values that Python cannot hold, are Unreadable.
    """
    number = 0
    try:
        for batch, unreadable in _batches(path):
            for row in _values(batch):
                number += 1
                yield Row(f"{path}: row {number}", {**row, **unreadable})
    except DataError:
        raise
    except Exception as error:
        behind = f", behind row {number}" if number else ""
        why = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path}: cannot be read as parquet{behind}: {why}") from error


def _batches(path: Path) -> Iterator[tuple[Any, dict[str, Unreadable]]]:
    """Yield Arrow tables of some rows each, and what stands for the columns that they leave out."""
    # Imported late: it takes seconds, and JSONL files do not need it.
    from datasets import Features, load_dataset
    from pyarrow import parquet, schema

    file = parquet.ParquetFile(path)
    fields = list(file.schema_arrow)
    _refuse_twice(path, [field.name for field in fields])
    readable = [field for field in fields if _has_feature(field)]
    unreadable = {
        field.name: Unreadable(f"a value of Arrow's type {field.type}") for field in fields if field not in readable
    }
    options: dict[str, Any] = {}
    if unreadable:
        names = [field.name for field in readable]
        options = {"columns": names, "features": Features.from_arrow_schema(schema(readable))}
    if file.metadata.num_rows == 0:
        return
    # Streaming: without it `datasets` writes a second copy of the rows to its own cache. As Arrow has them, since a
    # column with a null would become one of fractions.
    escaped = glob.escape(str(path.resolve()))
    rows = load_dataset("parquet", data_files=escaped, split="train", streaming=True, **options).with_format("arrow")
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        yield batch, unreadable


def _has_feature(field: Any) -> bool:
    """Return whether `datasets` has a type for an Arrow column."""
    from datasets import Features
    from pyarrow import schema

    try:
        Features.from_arrow_schema(schema([field]))
    except ValueError:
        return False
    return True


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield each row of a batch as Python values."""
    try:
        yield from batch.to_pylist()
    except (ValueError, ArithmeticError):
        columns = [[_value(cell) for cell in column] for column in batch.columns]
        yield from (dict(zip(batch.column_names, cells, strict=True)) for cells in zip(*columns, strict=True))


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Unreadable("invalid UTF-8")
    except (ValueError, ArithmeticError):
        return Unreadable(f"a {cell.type} that Python cannot hold")
