"""One row of a file as it was read, and the fields in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from malora_dist.errors import DataError, short

MISSING = object()
FIELDS_SHOWN, CHARACTERS_SHOWN = 20, 60


class BadRow(DataError):
    """A row that cannot be used; the message names file, line and field."""


@dataclass(frozen=True)
class Row:
    """One row as read. `problem` says why it could not be read; `fields` is then empty."""

    source: str
    fields: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Unreadable:
    """What stands for a value that Python cannot hold; a field that nobody needs may be one."""

    what: str

    def __str__(self) -> str:
        return self.what


def find_field(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; None for null, MISSING where there is none.

    `question.stem` is the field of that name, or else `stem` inside of `question`; a number counts a list from 0.
    """
    if name in fields:
        return None if _is_nan(fields[name]) else fields[name]
    value: Any = fields
    for part in name.split("."):
        value = _inside(value, part)
    return None if _is_nan(value) else value


def _inside(value: Any, part: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(part, MISSING)
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    return MISSING


def _is_nan(value: Any) -> bool:
    # What tables hold where a number is missing.
    return isinstance(value, float) and value != value


def needed_field(row: Row, name: str, role: str | None = None) -> Any:
    """Return a field's value. Raises BadRow where there is none, saying how a recipe names the field of that role."""
    value = find_field(row.fields, name)
    if value is None:
        raise BadRow(f"{row.source}: field {name!r} is null")
    if value is MISSING:
        raise BadRow(f"{row.source}: field {name!r} is missing; {what_row_has(row, role)}")
    return value


def what_row_has(row: Row, role: str | None) -> str:
    """Say which fields the row has, and which key of the task names another one for this role."""
    names = sorted(map(str, row.fields))
    first = listed(names[:FIELDS_SHOWN])
    found = first if len(names) <= FIELDS_SHOWN else f"{len(names)} fields, {first}, ..."
    how = f" (`fields: {{{role}: NAME}}` of the task names another)" if role is not None else ""
    if role == "choices":
        how = " (`fields: {choices: NAME}` of the task names another or one each, `choices` holds those of all rows)"
    return f"the row has {found}{how}"


def needed_text(row: Row, name: str, role: str | None = None) -> str:
    """Return a field's text. Raises BadRow where it is no text, is empty, or holds what is no character."""
    value = as_text(needed_field(row, name, role))
    if not isinstance(value, str):
        raise BadRow(f"{row.source}: field {name!r} must be text, is {shown(value)}")
    if not value.strip():
        raise BadRow(f"{row.source}: field {name!r} is empty")
    refuse_half_characters(row, name, value)
    return value


def as_text(value: Any) -> Any:
    """Write a whole number as digits, as tables hold it. A fraction may be written in several ways and stays one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def refuse_half_characters(row: Row, name: str, text: str) -> None:
    """Raise BadRow for half of a surrogate pair, which is no character and which no tokenizer takes."""
    place = broken_character(text)
    if place is not None:
        raise BadRow(f"{row.source}: field {name!r} holds an unpaired surrogate, {text[place]!r}, at place {place + 1}")


def broken_character(text: str) -> int | None:
    """Return the place of the first unpaired surrogate in a text; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def listed(texts: Sequence[str]) -> str:
    """Write texts as Python writes a list of them, each cut short."""
    return f"[{', '.join(short(text, CHARACTERS_SHOWN) for text in texts)}]"


def shown(value: Any) -> str:
    """Write a value with its type, cut short."""
    return str(value) if isinstance(value, Unreadable) else f"{type(value).__name__} {short(value)}"
