"""The choices of a row, in the ways that data sets write them."""

from collections.abc import Sequence
from typing import Any

from malora_dist.data.json_rows import NotJson, parse_whole
from malora_dist.data.row import (
    MISSING,
    BadRow,
    Row,
    as_text,
    find_field,
    needed_field,
    refuse_half_characters,
    shown,
    what_row_has,
)
from malora_dist.errors import short

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Texts = tuple[str, ...]
Field = str | Sequence[str]


def has_choices(row: Row, field: Field, fixed: Sequence[str] | None) -> bool:
    """Return whether the row or its task has choices."""
    names = [field] if isinstance(field, str) else field
    return fixed is not None or any(find_field(row.fields, name) not in (None, MISSING) for name in names)


def read_choices(row: Row, field: Field, fixed: Sequence[str] | None) -> tuple[Texts, Texts]:
    """Return the texts of the choices, without outer blanks, and their keys where the row names them.

    `fixed` are the task's own; else one field holds them all, or several hold one each. Raises BadRow for fewer than
    two choices, more than there are letters, an empty one or one that is given twice.
    """
    if fixed is not None:
        if has_choices(row, field, None):
            raise BadRow(f"{row.source}: field {field!r} holds choices, and the task has its own: `choices`")
        return tuple(choice.strip() for choice in fixed), ()
    if isinstance(field, str):
        (values, keys), where = _listed(row, field), f"field {field!r}"
    else:
        (values, keys), where = _columns(row, field), f"fields {list(field)}"
    choices = tuple(choice.strip() for choice in values)
    if not 2 <= len(choices) <= len(LETTERS):
        raise BadRow(f"{row.source}: {where} must hold 2 to {len(LETTERS)} choices, holds {len(choices)}")
    if "" in choices:
        raise BadRow(f"{row.source}: {where} holds an empty choice")
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise BadRow(f"{row.source}: {where} holds the choice {short(twice)} twice")
    return choices, keys


def _columns(row: Row, names: Sequence[str]) -> tuple[list[str], Texts]:
    """Read a choice from each field, whose name is its key. The last may be empty or left out: other rows have more."""
    values = [as_text(find_field(row.fields, name)) for name in names]
    while values and (_is_empty(values[-1]) or (values[-1] is MISSING and len(values) > 2)):
        values.pop()
    for name, value in zip(names, values, strict=False):
        if value is MISSING:
            raise BadRow(f"{row.source}: field {name!r} is missing; {what_row_has(row, 'choices')}")
        if value is not None and not isinstance(value, str):
            raise BadRow(f"{row.source}: field {name!r} must be text, is {shown(value)}")
        refuse_half_characters(row, name, value or "")
    return [value or "" for value in values], tuple(names[: len(values)])


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _listed(row: Row, name: str) -> tuple[list[str], Texts]:
    """Read the texts of a row's choices, and their keys where it names them.

    They are a list of texts, a list of {"text": ..., "label": ...}, {"text": [...], "label": [...]}, or JSON of these.
    """
    value = needed_field(row, name, "choices")
    if isinstance(value, str):
        value = _from_json(row, name, value)
    keys: Any = ()
    if isinstance(value, dict) and "text" in value:
        value, keys = value["text"], value.get("label")
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "text" in item for item in value):
        value, keys = [item["text"] for item in value], [item.get("label") for item in value]
    texts: list[Any] = [as_text(choice) for choice in value] if isinstance(value, list | tuple) else [None]
    if not all(isinstance(choice, str) for choice in texts):
        raise BadRow(f"{row.source}: field {name!r} must be a list of texts, is {shown(value)}")
    for choice in texts:
        refuse_half_characters(row, name, choice)
    named = isinstance(keys, list | tuple) and len(keys) == len(value) and all(isinstance(k, str | int) for k in keys)
    return texts, tuple(str(key).strip() for key in keys) if named else ()


def _from_json(row: Row, name: str, value: str) -> Any:
    try:
        return parse_whole(value)
    except NotJson:
        raise BadRow(
            f"{row.source}: field {name!r} must be a list, or a JSON list as text, is {shown(value)} "
            "(several fields with a choice each: `fields: {choices: [A, B, ...]}`)"
        ) from None
