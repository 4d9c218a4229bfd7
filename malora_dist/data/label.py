"""Which of a row's choices is right, in the ways that data sets write it."""

import re
from dataclasses import dataclass
from typing import Any

from malora_dist.data.choices import LETTERS, Texts
from malora_dist.data.row import BadRow, Row, listed, needed_field, shown
from malora_dist.errors import short

WHOLE_NUMBER = re.compile(r"(\d{1,9})(?:\.0+)?", re.ASCII)
TRUTH = {"true": True, "false": False}
SAYS = {True: ("true", "yes"), False: ("false", "no")}
COUNTED = "counted"


@dataclass(frozen=True)
class Label:
    """The index of the right choice.

    counted: the label is a number that was counted from the first choice, and nothing else says that it is that one.
    two_meanings: it is also the text, letter or number of another choice.
    """

    index: int
    counted: bool
    two_meanings: bool


def read_label(row: Row, field: str, choices: Texts, keys: Texts, first_label: int = 0) -> Label:
    """Find the right choice of a row. Raises BadRow if the field names none.

    A label is a choice's key where the row names keys. Else a text is a choice, its letter or its number, and a number
    counts from `first_label`. True and false are the choices that say so (yes, no).
    """
    value = needed_field(row, field, "label")
    number = number_of(value)
    if number is None and not isinstance(value, str | bool):
        raise BadRow(f"{row.source}: field {field!r} must be a number, a letter or a choice, is {shown(value)}")
    meanings = _meanings(value, number, choices, keys, first_label)
    if not meanings:
        among = f"is not among the {len(choices)} choices {listed(choices)}"
        hint = "" if number is None else f"; numbers count from {first_label} (`first_label` of the task)"
        if isinstance(value, bool):
            hint = "; true and false need choices such as yes and no, or true and false"
        raise BadRow(f"{row.source}: field {field!r}: {short(value)} {among}{hint}")
    (way, index), *others = meanings
    agrees = [other == index for _, other in others]
    return Label(index, counted=way == COUNTED and not any(agrees), two_meanings=not all(agrees))


def number_of(value: Any) -> int | None:
    """Return the whole number that a label is: also 1.0, and "1" or "1.0" as text. None if it is something else."""
    if isinstance(value, str):
        found = WHOLE_NUMBER.fullmatch(value.strip())
        return int(found[1]) if found else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _meanings(value: Any, number: int | None, choices: Texts, keys: Texts, first_label: int) -> list[tuple[str, int]]:
    """List the choices that a label may mean, each with the way to read it; the first is the one that is taken."""
    if isinstance(value, bool):
        return _those_found(truth=_truth(value, choices))
    written = str(value).strip()
    same_number = written if number is None else str(number)
    key = _place(keys, written, same_number)
    text = _place(choices, written, same_number)
    if key is not None:
        return _those_found(key=key, text=text)
    # Beside keys that are numbers, another number is none of them.
    names_numbers = any(key.isdecimal() for key in keys)
    counted = None if number is None or names_numbers else _within(number - first_label, choices)
    if not isinstance(value, str):
        # Where `first_label` says how numbers are meant, they mean nothing else.
        return _those_found(counted=counted, text=None if counted is None or first_label else text)
    letter = _within(LETTERS.find(written), choices) if len(written) == 1 else None
    # As tables write true and false.
    truth = _truth(TRUTH[written.lower()], choices) if written.lower() in TRUTH else None
    exact = _place(choices, written)
    return _those_found(exact=exact, letter=letter, truth=truth, counted=counted, text=text)


def _those_found(**places: int | None) -> list[tuple[str, int]]:
    return [(way, place) for way, place in places.items() if place is not None]


def _place(among: Texts, *names: str) -> int | None:
    return next((among.index(name) for name in names if name in among), None)


def _within(index: int, choices: Texts) -> int | None:
    return index if 0 <= index < len(choices) else None


def _truth(value: bool, choices: Texts) -> int | None:
    """Find the choice that says what `value` does; None unless one choice says so, and one the contrary."""
    found = {truth: [choice for choice in choices if choice.lower() in words] for truth, words in SAYS.items()}
    return choices.index(found[value][0]) if len(found[True]) == len(found[False]) == 1 else None
