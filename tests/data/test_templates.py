"""Texts of prompts, answers and choices."""

import pytest

from malora_dist.data.example import Example
from malora_dist.data.templates import choice_texts, fill, prompt_text, response_text, template_fields
from malora_dist.errors import DataError

QUESTION = Example("t", "2 + 2?", "four", ("three", "four"), 1, source="f.jsonl:9", extra={"passage": "{sums}"})


def test_text_scoring() -> None:
    assert prompt_text(QUESTION) == "Question: 2 + 2?\nAnswer:"
    assert choice_texts(QUESTION) == (" three", " four")
    assert response_text(QUESTION) == " four"


def test_letter_scoring_lists_the_options_under_the_question() -> None:
    assert prompt_text(QUESTION, scoring="letter") == "Question: 2 + 2?\nA. three\nB. four\nAnswer:"
    assert choice_texts(QUESTION, scoring="letter") == (" A", " B")
    assert response_text(QUESTION, scoring="letter") == " B"


def test_other_fields_and_braces() -> None:
    template = "{passage}|{{{prompt}}}|{prompt}"
    assert template_fields(template) == ("passage", "prompt")
    assert prompt_text(QUESTION, template) == "{sums}|{2 + 2?}|2 + 2?"


def test_a_dotted_name_is_a_field_and_no_attribute() -> None:
    template = "{question.stem}|{answers.text.0!r:>5}|{prompt}"
    assert template_fields(template) == ("question.stem", "answers.text.0", "prompt")
    values = {"question.stem": "why?", "answers.text.0": "so", "prompt": "p"}
    assert fill(template, values) == "why?| 'so'|p"


def test_completion() -> None:
    example = Example("t", "p", "{r}\n")
    assert response_text(example, "<{response}>") == "<{r}\n>"


@pytest.mark.parametrize(
    "template", ["{", "{}", "{0}", "{prompt.__class__}", "{prompt[0]}", "{prompt:d}", "{prompt!x}"]
)
def test_broken_templates(template: str) -> None:
    with pytest.raises(DataError, match="template"):
        template_fields(template)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:9: template .*no field 'context'; known here: \['prompt'\]"):
        fill("{context} {prompt}", {"prompt": "p"}, "f.jsonl:9")
