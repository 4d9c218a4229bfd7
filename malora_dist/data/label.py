"""Which of a row's choices is right, in the ways that data sets write it."""

import re
from typing import Any

from malora_dist.data.choices import LETTERS, Texts
from malora_dist.data.row import BadRow, Row, needed_field, short, shown

WHOLE_NUMBER = re.compile(r"(\d{1,9})(?:\.0+)?", re.ASCII)
TRUTH = {"true": True, "false": False}
SAYS = {True: ("true", "yes"), False: ("false", "no")}


def read_label(row: Row, field: str, choices: Texts, keys: Texts, first_label: int = 0) -> int:
    """Index of the right choice. Raises BadRow if the field names none.

    A text is a choice, else a choice's key, its letter, its number. A number is a choice's key, else it counts from
    `first_label`. True and false are the choices that say so (yes, no).
    """
    value = needed_field(row, field, "label")
    number = number_of(value)
    if isinstance(value, str):
        index = _index_of_text(value.strip(), choices, keys)
    elif isinstance(value, bool):
        index = _index_of_truth(value, choices)
    elif number is None:
        raise BadRow(f"{row.source}: field {field!r} must be a number, a letter or a choice, is {shown(value)}")
    else:
        index = keys.index(str(number)) if str(number) in keys else None
    # Beside keys that are numbers, another number is none of them.
    if index is None and number is not None and not any(key.isdecimal() for key in keys):
        index = number - first_label
    if index is None or not 0 <= index < len(choices):
        among = f"is not among the {len(choices)} choices {list(choices)}"
        hint = "" if number is None else f"; numbers count from {first_label} (`first_label` of the task)"
        if isinstance(value, bool):
            hint = "; true and false are choices that say so: yes and no, or true and false"
        raise BadRow(f"{row.source}: field {field!r}: {short(value)} {among}{hint}")
    return index


def number_of(value: Any) -> int | None:
    """The whole number that a label is: also 1.0, and "1" or "1.0" in a text. None if it is something else."""
    if isinstance(value, str):
        found = WHOLE_NUMBER.fullmatch(value.strip())
        return int(found[1]) if found else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_counted(value: Any, choices: Texts, index: int) -> bool:
    """Whether the label is a number that was counted from 0, as far as the choice that it led to tells."""
    return number_of(value) == index and str(value).strip() not in choices


def _index_of_text(value: str, choices: Texts, keys: Texts) -> int | None:
    if value in choices:
        return choices.index(value)
    if value in keys:
        return keys.index(value)
    if len(value) == 1 and value in LETTERS:
        return LETTERS.index(value)
    # As tables write it.
    return _index_of_truth(TRUTH[value.lower()], choices) if value.lower() in TRUTH else None


def _index_of_truth(value: bool, choices: Texts) -> int | None:
    """The choice that says so, if one does, and another one says the contrary."""
    found = {truth: [choice for choice in choices if choice.lower() in words] for truth, words in SAYS.items()}
    return choices.index(found[value][0]) if len(found[True]) == len(found[False]) == 1 else None
