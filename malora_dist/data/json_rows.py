"""Rows out of JSON: one object a line, or one list of objects. What cannot be read is a bad row that says why."""

# Not through `datasets`, which names neither the line nor the field of a bad row, and in which one column cannot hold
# both 1 and "B" as labels.
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malora_dist.data.row import Row, Unreadable
from malora_dist.errors import DataError, short
from malora_dist.files.json_text import key_given_twice

BLANKS = re.compile(r"[ \t\n\r]*")


class NotJson(ValueError):
    """Why a text is not read as JSON, and the place in it."""

    def __init__(self, why: str, place: int) -> None:
        super().__init__(why)
        self.place = place


def _whole_number(digits: str) -> int | Unreadable:
    try:
        return int(digits)
    except ValueError:
        return Unreadable(f"a number of {len(digits):,} digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    twice = key_given_twice(pairs)
    return dict(pairs) if twice is None else Unreadable(f"an object that gives {short(twice)} twice")


DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_object)


def parse_value_at(text: str, start: int = 0) -> tuple[Any, int]:
    """Parse the JSON value that begins at `start` of a text; return it and where it ends. Raises NotJson."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON: {error.msg} at column {error.colno}", error.pos) from None
    except RecursionError:
        raise NotJson("cannot be read: lists or objects are nested too deeply", start) from None


def parse_whole(text: str) -> Any:
    """Parse a text that is one JSON value, apart from blanks around it. Raises NotJson."""
    value, end = parse_value_at(text, _skip_blanks(text, 0))
    end = _skip_blanks(text, end)
    if end < len(text):
        raise NotJson(f"not JSON: more follows behind the value, at place {end + 1}", end)
    return value


def read_json_lines(path: Path) -> Iterator[Row]:
    """Read all rows of a file with an object on each line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _line_row(f"{path}:{number}", line, number)


def _line_row(source: str, line: bytes, number: int) -> Row:
    try:
        text = line.decode("utf-8-sig")
        row = _object_row(source, parse_whole(text))
    except UnicodeDecodeError as error:
        return Row(source, {}, f"invalid UTF-8 at byte {error.start} of the line")
    except NotJson as error:
        row = Row(source, {}, str(error))
    if row.problem is not None and number == 1 and text.lstrip().startswith("["):
        return Row(source, {}, f"{row.problem}; a file with a list of objects is named .json")
    return row


def _object_row(source: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(source, value)
    kind = str(value) if isinstance(value, Unreadable) else type(value).__name__
    return Row(source, {}, f"must be an object with fields, is {kind}")


def read_json_list(path: Path) -> Iterator[Row]:
    """Read all rows of a file that is a list of objects. Raises DataError, naming the line, where it is none."""
    text = _decoded(path)
    place = _skip_blanks(text, 0)
    if not text.startswith("[", place):
        raise DataError(_why_no_list(path, text, place))
    place = _skip_blanks(text, place + 1)
    number = 0
    while not (number == 0 and text.startswith("]", place)):
        try:
            value, end = parse_value_at(text, place)
        except NotJson as error:
            raise DataError(f"{path}:{_line_of(text, error.place)}: {error}, in row {number + 1}") from None
        number += 1
        yield _object_row(f"{path}: row {number}", value)
        place = _skip_blanks(text, end)
        if not text.startswith(",", place):
            break
        place = _skip_blanks(text, place + 1)
    rest = _skip_blanks(text, place + 1)
    if not text.startswith("]", place) or rest < len(text):
        raise DataError(f"{path}:{_line_of(text, place)}: not JSON: the list does not end behind row {number}")


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: invalid UTF-8") from None


def _why_no_list(path: Path, text: str, place: int) -> str:
    try:
        value, end = parse_value_at(text, place)
    except NotJson as error:
        return f"{path}:{_line_of(text, error.place)}: {error}"
    if _skip_blanks(text, end) < len(text) and isinstance(value, dict):
        return f"{path}: holds JSON lines, one object a line, where .json is one list of objects: name it .jsonl"
    return f"{path}: must be a list of objects, is {type(value).__name__} (one object a line: .jsonl)"


def _skip_blanks(text: str, place: int) -> int:
    found = BLANKS.match(text, place)
    assert found is not None
    return found.end()


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
