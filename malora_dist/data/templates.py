"""An example's texts: the prompt, the answer to learn, and the answers to choose from."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from malora_dist.config.data_schema import template_names
from malora_dist.data.choices import LETTERS
from malora_dist.data.example import Example
from malora_dist.errors import DataError

PROMPT_TEMPLATE = "Question: {prompt}\nAnswer:"
RESPONSE_TEMPLATE = " {response}"
TEXT = "text"
LETTER = "letter"


def template_fields(template: str) -> tuple[str, ...]:
    """List the field names of a template, in order. Raises DataError for a broken template or an unnamed field."""
    try:
        names = template_names(template)
    except ValueError as error:
        raise DataError(f"template {template!r}: {error} (write {{{{ for a brace)") from error
    return tuple(dict.fromkeys(names))


def fill(template: str, values: Mapping[str, str], source: str = "") -> str:
    """Fill in the fields of a template. Raises DataError naming a field that `values` lacks."""
    try:
        return _Filler().vformat(template, (), values)
    except KeyError as error:
        template_fields(template)
        place = f"{source}: " if source else ""
        known = f"known here: {sorted(values)}"
        raise DataError(f"{place}template {template!r}: no field {error.args[0]!r}; {known}") from error


class _Filler(string.Formatter):
    """Takes a dotted name for the name of a value, and not for an attribute of one."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name


def prompt_text(example: Example, prompt_template: str = PROMPT_TEMPLATE, scoring: str = TEXT) -> str:
    """Return the text before the answer. With letter scoring the options stand under the question as "A. ..."."""
    prompt = example.prompt
    if scoring == LETTER:
        options = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False))
        prompt = "\n".join((prompt, *options))
    return fill(prompt_template, {**example.extra, "prompt": prompt}, example.source)


def response_text(example: Example, response_template: str = RESPONSE_TEMPLATE, scoring: str = TEXT) -> str:
    """Return the text to learn: for multiple choice exactly one of `choice_texts`."""
    if example.label is not None:
        return choice_texts(example, response_template, scoring)[example.label]
    return fill(response_template, {**example.extra, "response": example.response}, example.source)


def choice_texts(example: Example, response_template: str = RESPONSE_TEMPLATE, scoring: str = TEXT) -> tuple[str, ...]:
    """Return all choices as the model would write them: the choices, or their letters with letter scoring."""
    answers = LETTERS[: len(example.choices)] if scoring == LETTER else example.choices
    return tuple(fill(response_template, {**example.extra, "response": answer}, example.source) for answer in answers)
