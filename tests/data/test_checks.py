"""Rows as public data sets have them, and what a task says of its rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from malora_dist.data.example import Example
from malora_dist.data.tasks import load_task
from malora_dist.errors import DataError

ROLES = {"prompt": "prompt", "choices": "choices", "label": "label", "response": "response"}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], Example]] = {
    "BoolQ": (
        {"question": "is it?", "passage": "it is", "answer": True},
        {"fields": {**ROLES, "prompt": "question", "label": "answer"}, "choices": ("no", "yes")}
        | {"template_fields": ("passage",)},
        Example("t", "is it?", "yes", ("no", "yes"), 1, extra={"passage": "it is"}),
    ),
    "PIQA": (
        {"goal": "open a jar", "sol1": "twist it ", "sol2": "eat it", "label": 0},
        {"fields": {**ROLES, "prompt": "goal", "choices": ("sol1", "sol2")}},
        Example("t", "open a jar", "twist it", ("twist it", "eat it"), 0),
    ),
    "MMLU": (
        {"question": "q", "A": "a", "B": "b", "C": "c", "D": "", "answer": "C"},
        {"fields": {**ROLES, "prompt": "question", "choices": ("A", "B", "C", "D"), "label": "answer"}},
        Example("t", "q", "c", ("a", "b", "c"), 2),
    ),
    "ARC": (
        {"question": {"stem": "q", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}, "key": "2"},
        {"fields": {**ROLES, "prompt": "question.stem", "choices": "question.choices", "label": "key"}},
        Example("t", "q", "b", ("a", "b"), 1),
    ),
    "WinoGrande": (
        {"sentence": "q", "option1": "a", "option2": "b", "answer": "2"},
        {"fields": {**ROLES, "prompt": "sentence", "choices": ("option1", "option2"), "label": "answer"}}
        | {"first_label": 1},
        Example("t", "q", "b", ("a", "b"), 1),
    ),
    "SQuAD": (
        {"question": "q", "answers": {"text": ["first", "second"]}, "a.b": "c"},
        {"fields": {**ROLES, "prompt": "question", "response": "answers.text.0"}, "template_fields": ("a.b",)},
        Example("t", "q", "first", extra={"a.b": "c"}),
    ),
    "Alpaca": (
        {"instruction": "do it", "input": "", "output": "done"},
        {"fields": {**ROLES, "prompt": "instruction", "response": "output"}}
        | {"template_fields": ("input", "more"), "optional_fields": ("input", "more")},
        Example("t", "do it", "done", extra={"input": "", "more": ""}),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_as_public_data_sets_have_them(name: str, write_jsonl: Any) -> None:
    row, options, expected = SHAPES[name]
    path = write_jsonl("t.jsonl", [row])
    assert load_task(name="t", train=path, **options).train == (replace(expected, source=f"{path}:1"),)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_whole_numbers_are_texts_in_every_format(suffix: str, tmp_path: Path) -> None:
    """As arithmetic has them."""
    path = tmp_path / f"t{suffix}"
    for row, options in (
        ({"prompt": "6 * 7?", "response": 42, "year": 1999}, {"template_fields": ("year",)}),
        ({"prompt": 42, "A": 6, "B": 7, "label": "B"}, {"fields": {**ROLES, "choices": ("A", "B")}}),
    ):
        write_row(path, row)
        (example,) = load_task(name="t", train=str(path), **options).train
        assert (example.prompt, example.response) == (str(row["prompt"]), str(row.get("response", 7)))
        assert example.choices in ((), ("6", "7")) and example.extra in ({}, {"year": "1999"})


def test_choices_in_a_list_may_be_whole_numbers(write_jsonl: Any) -> None:
    for choices in ([41, 42], "[41, 42]", {"text": [41, "42"], "label": ["a", "b"]}, [{"text": 41}, {"text": 42}]):
        path = write_jsonl("t.jsonl", [{"prompt": "6 * 7?", "choices": choices, "label": "42"}])
        (example,) = load_task(name="t", train=path).train
        assert (example.choices, example.label) == (("41", "42"), 1)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """A file of one row, as its suffix says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(separator.join(map(str, cells)) + "\n" for cells in (row, row.values())))
    else:
        path.write_text(json.dumps([row] if path.suffix == ".json" else row))


def test_a_field_that_is_missing_says_how_to_name_it(write_jsonl: Any) -> None:
    path = write_jsonl("t.jsonl", [{"question": "q", "answer": "r"}])
    with pytest.raises(DataError) as error:
        load_task(name="t", train=path)
    assert "the row has ['answer', 'question'] (`fields: {prompt: NAME}` of the task names another)" in str(error.value)
    named = {**ROLES, "prompt": "question", "response": "answer"}
    with pytest.raises(DataError, match=r"field 'passage' is missing; .* \(`optional_fields` of the task names those"):
        load_task(name="t", train=path, fields=named, template_fields=("passage",))
    fields = {**ROLES, "prompt": "question", "choices": ("A", "B"), "label": "answer"}
    with pytest.raises(DataError, match=r"field 'A' is missing; .* \(`fields: \{choices: NAME\}`"):
        load_task(name="t", train=path, fields=fields)


@pytest.mark.parametrize("last", [{}, {"C": None}, {"C": ""}])
def test_the_last_choices_may_be_left_out(write_jsonl: Any, last: dict[str, Any]) -> None:
    rows = [{"prompt": "p", "A": "x", "B": "y", "label": "B", **last}, {"prompt": "q", "A": "x", "B": "y", "label": 0}]
    fields = {**ROLES, "choices": ("A", "B", "C", "D")}
    task = load_task(name="t", train=write_jsonl("t.jsonl", rows), fields=fields)
    assert [row.choices for row in task.train] == [("x", "y")] * 2 and task.counts["choice_fields_unused"] == 2
    rows[1] |= {"C": "z", "D": 4}
    task = load_task(name="t", train=write_jsonl("t.jsonl", rows), fields=fields)
    assert [len(row.choices) for row in task.train] == [2, 4] and "choice_fields_unused" not in task.counts
    path = write_jsonl("t.jsonl", [{"prompt": "p", "A": "x", "C": "y", "label": "A"}])
    with pytest.raises(DataError, match="field 'B' is missing"):
        load_task(name="t", train=path, fields=fields)


def test_a_message_is_short_whatever_stands_in_the_row(write_jsonl: Any) -> None:
    long = "x" * 5000
    for row in (
        {f"{number}{long}": 1 for number in range(30)},
        {"prompt": "p", "choices": [long, f"{long}y"], "label": "z"},
        {"prompt": "p", "choices": [long, long], "label": 0},
    ):
        with pytest.raises(DataError) as error:
            load_task(name="t", train=write_jsonl("t.jsonl", [row]))
        assert len(str(error.value)) < 2500 and "xxx..." in str(error.value)


def test_choices_of_the_task_hide_none_of_a_row(write_jsonl: Any) -> None:
    path = write_jsonl("t.jsonl", [{"prompt": "p", "choices": ["no", "yes"], "label": 1}])
    with pytest.raises(DataError, match=r"t\.jsonl:1: field 'choices' holds choices, and the task has its own"):
        load_task(name="t", train=path, choices=("yes", "no"))


@pytest.mark.parametrize("write", [float, lambda i: f"{i}.0", lambda i: f" {i}.00", str, int])
@pytest.mark.parametrize("held_out", [1, 1.0, "1", "1.0"])
def test_a_group_is_the_same_as_number_and_as_fraction(write_jsonl: Any, write: Any, held_out: Any) -> None:
    """As when a column of one of two files has a number missing, which pandas writes to a table as text."""
    train = write_jsonl("a.jsonl", [{"prompt": f"p{i}", "response": "r", "id": write(i)} for i in range(3)])
    test = write_jsonl("b.jsonl", [{"prompt": "other", "response": "r", "id": held_out}])
    assert load_task(name="t", train=train, test=test, group_by="id").counts["shared_groups_removed"] == 1
