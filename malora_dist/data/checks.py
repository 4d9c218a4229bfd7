"""From a raw row to an Example: every field is checked, and a bad row says which field breaks which rule."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from malora_dist.data.choices import Field, has_choices, read_choices
from malora_dist.data.example import COMPLETION, MULTIPLE_CHOICE, Example
from malora_dist.data.label import Label, read_label
from malora_dist.data.row import MISSING, BadRow, Row, find_field, needed_field, needed_text, shown, what_row_has

FRACTION_OF_NOTHING = re.compile(r"(-?\d+)\.0+", re.ASCII)
DEFAULT_FIELDS: Mapping[str, Field] = {role: role for role in ("prompt", "choices", "label", "response")}


@dataclass(frozen=True)
class RowRules:
    """How a task's rows are read. `fields` names the row's fields by role: prompt, choices, label, response.

    template_fields: further ones to keep, of which the optional ones may be empty. choices: those of every row, where
    rows hold none. first_label: the number of the first choice.
    """

    task: str
    fields: Mapping[str, Any] = field(default_factory=lambda: DEFAULT_FIELDS)
    template_fields: Sequence[str] = ()
    optional_fields: Sequence[str] = ()
    group_by: str | None = None
    choices: Sequence[str] | None = None
    first_label: int = 0

    def kind_of(self, row: Row) -> str:
        """Return multiple_choice if row or task has choices, or a label in place of a response; else completion."""
        has = {role: find_field(row.fields, self.fields[role]) not in (None, MISSING) for role in ("label", "response")}
        chosen = has_choices(row, self.fields["choices"], self.choices) or (has["label"] and not has["response"])
        return MULTIPLE_CHOICE if chosen else COMPLETION

    def read(self, row: Row, kind: str) -> tuple[Example, Label | None]:
        """Return the row as an Example, and its label where it has choices.

        Raises BadRow for a missing field, an empty text, a wrong type, a repeated choice or a label that is no choice.
        """
        if row.problem is not None:
            raise BadRow(f"{row.source}: {row.problem}")
        prompt = needed_text(row, self.fields["prompt"], "prompt")
        choices: tuple[str, ...] = ()
        label = None
        if kind == MULTIPLE_CHOICE:
            choices, keys = read_choices(row, self.fields["choices"], self.choices)
            label = read_label(row, self.fields["label"], choices, keys, self.first_label)
        response = needed_text(row, self.fields["response"], "response") if label is None else choices[label.index]
        extra = {name: self._extra(row, name) for name in self.template_fields}
        group = None if self.group_by is None else _group(row, self.group_by)
        index = None if label is None else label.index
        return Example(self.task, prompt, response, choices, index, group, row.source, extra), label

    def _extra(self, row: Row, name: str) -> str:
        value = find_field(row.fields, name)
        if value not in (None, MISSING) and not (isinstance(value, str) and not value.strip()):
            return needed_text(row, name)
        if name in self.optional_fields:
            return ""
        state = {None: "is null", MISSING: "is missing"}.get(value, "is empty")
        how = "`optional_fields` of the task names those that may be empty"
        raise BadRow(f"{row.source}: field {name!r} {state}; {what_row_has(row, None)} ({how})")


def _group(row: Row, name: str) -> str:
    value = needed_field(row, name)
    if not isinstance(value, str | int | float):
        raise BadRow(f"{row.source}: field {name!r} (group_by) must be text or a number, is {shown(value)}")
    # A column with one number missing has become one of fractions, in another file, as text too, it has not.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    whole = FRACTION_OF_NOTHING.fullmatch(value.strip()) if isinstance(value, str) else None
    return whole[1] if whole is not None else str(value)
