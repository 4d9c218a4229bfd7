"""From a raw row to an Example: every field is checked, and a bad row says which field breaks which rule."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from malora_dist.data.example import COMPLETION, MULTIPLE_CHOICE, Example
from malora_dist.data.rows import Row
from malora_dist.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class BadRow(DataError):
    """A row that cannot be used; the message names file, line and field."""


def kind_of(row: Row, fields: Mapping[str, str]) -> str:
    """multiple_choice if the row has choices, or a label where a response would be; else completion."""
    has = {role: row.fields.get(name) is not None for role, name in fields.items()}
    return MULTIPLE_CHOICE if has["choices"] or (has["label"] and not has["response"]) else COMPLETION


def check_row(
    row: Row,
    *,
    task: str,
    kind: str,
    fields: Mapping[str, str],
    template_fields: Sequence[str] = (),
    group_by: str | None = None,
) -> Example:
    """The row as an Example. `fields` names the row's fields by role: prompt, choices, label, response.

    Raises BadRow for a missing field, an empty text, a wrong type, a repeated choice or a label that is no choice.
    """
    if row.problem is not None:
        raise BadRow(f"{row.source}: {row.problem}")
    prompt = _text(row, fields["prompt"])
    choices: tuple[str, ...] = ()
    label = None
    if kind == MULTIPLE_CHOICE:
        choices, keys = _choices(row, fields["choices"])
        label = _label(row, fields["label"], choices, keys)
    response = _text(row, fields["response"]) if label is None else choices[label]
    extra = {name: _text(row, name) for name in template_fields}
    group = None if group_by is None else _group(row, group_by)
    return Example(task, prompt, response, choices, label, group, row.source, extra)


def _value(row: Row, name: str) -> Any:
    value = row.fields.get(name)
    if value is None:
        state = "is null" if name in row.fields else f"is missing; the row has {sorted(map(str, row.fields))}"
        raise BadRow(f"{row.source}: field {name!r} {state}")
    return value


def _text(row: Row, name: str) -> str:
    value = _value(row, name)
    if not isinstance(value, str):
        raise BadRow(f"{row.source}: field {name!r} must be text, is {_shown(value)}")
    if not value.strip():
        raise BadRow(f"{row.source}: field {name!r} is empty")
    return value


def _group(row: Row, name: str) -> str:
    value = _value(row, name)
    if not isinstance(value, str | int | float):
        raise BadRow(f"{row.source}: field {name!r} (group_by) must be text or a number, is {_shown(value)}")
    return str(value)


def _choices(row: Row, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts of the choices, without outer blanks, and their keys where the row has {"text": [...], "label": [...]}."""
    value = _value(row, name)
    if isinstance(value, str):
        value = _json_list(row, name, value)
    keys: Any = ()
    if isinstance(value, dict) and "text" in value:
        value, keys = value["text"], value.get("label") or ()
    if not isinstance(value, list | tuple) or not all(isinstance(choice, str) for choice in value):
        raise BadRow(f"{row.source}: field {name!r} must be a list of texts, is {_shown(value)}")
    choices = tuple(choice.strip() for choice in value)
    if not 2 <= len(choices) <= len(LETTERS):
        raise BadRow(f"{row.source}: field {name!r} must hold 2 to {len(LETTERS)} choices, holds {len(choices)}")
    if "" in choices:
        raise BadRow(f"{row.source}: field {name!r} holds an empty choice")
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise BadRow(f"{row.source}: field {name!r} holds the choice {twice!r} twice")
    return choices, tuple(str(key) for key in keys)


def _json_list(row: Row, name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise BadRow(f"{row.source}: field {name!r} must be a list, or a JSON list as text, is {value!r}") from None


def _label(row: Row, name: str, choices: tuple[str, ...], keys: tuple[str, ...]) -> int:
    """Index of the right choice. A number counts from 0; a text is a choice, else a choice's key, letter or number."""
    value = _value(row, name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadRow(f"{row.source}: field {name!r} must be a number, a letter or a choice, is {_shown(value)}")
    index = value if isinstance(value, int) else _index_of_text(value.strip(), choices, keys)
    if index is None or not 0 <= index < len(choices):
        raise BadRow(f"{row.source}: field {name!r}: {value!r} is not among the {len(choices)} choices {list(choices)}")
    return index


def _index_of_text(value: str, choices: tuple[str, ...], keys: tuple[str, ...]) -> int | None:
    if value in choices:
        return choices.index(value)
    if value in keys:
        return keys.index(value)
    if len(value) == 1 and value in LETTERS:
        return LETTERS.index(value)
    return int(value) if value.isdecimal() and value.isascii() else None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
