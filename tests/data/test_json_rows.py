"""Lines and lists in JSON: rows, or file, line and field of what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from malora_dist.data.tasks import load_task

GOOD = {"prompt": "good", "response": "r"}
HALF = '{"prompt": "The wall is red \\ud83d.", "response": "r"}'
DEEP = f'{{"prompt": {"[" * 9000}{"]" * 9000}, "response": "r"}}'
LONG = f'{{"prompt": {"7" * 9000}, "response": "r"}}'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (HALF, r"field 'prompt' holds an unpaired surrogate, '\ud83d', at place 17"),
        (DEEP, "cannot be read: lists or objects are nested too deeply"),
        (LONG, "field 'prompt' must be text, is a number of 9,000 digits"),
        ('{"prompt": "p", "prompt": "q", "response": "r"}', "must be an object with fields, is an object that gives"),
        ('{"prompt": "p", "response": "r"} {}', "not JSON: more follows behind the value, at place 34"),
        ('{"prompt": NaN, "response": "r"}', "field 'prompt' is null"),
        ('{"prompt": [[[[[[[[[["p"]]]]]]]]]], "response": "r"}', "field 'prompt' must be text, is list [[[["),
    ],
)
def test_a_bad_line_of_json_is_named_or_skipped(tmp_path: Path, line: str, why: str, refusal: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    assert f"{path}:2: {why}" in refusal(path)
    assert load_task(name="t", train=str(path), on_bad_row="skip").counts["bad_rows_skipped"] == 1


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ('["\\ud83d", "b"]', r"field 'choices' holds an unpaired surrogate, '\ud83d', at place 1"),
        (f'"{"[" * 9000}"', "field 'choices' must be a list, or a JSON list as text"),
        ('{"text": "ab", "label": [1, 2]}', "field 'choices' must be a list of texts, is str 'ab'"),
    ],
)
def test_bad_choices_in_json(tmp_path: Path, choices: str, why: str, refusal: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"prompt": "p", "choices": {choices}, "label": 0}}\n')
    assert f"{path}:1: {why}" in refusal(path)


def test_what_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    more = f'"note": "\\ud83d", "id": {"7" * 9000}, "twice": {{"a": 1, "a": 2}}'
    path.write_text(f'{{"prompt": "p", "response": "r", {more}}}\n')
    assert len(load_task(name="t", train=str(path)).train) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", ": holds JSON lines, one object a line"),
        (json.dumps(GOOD), ": must be a list of objects, is dict (one object a line: .jsonl)"),
        (f"[{json.dumps(GOOD)},\n{LONG}]", ": row 2: field 'prompt' must be text, is a number of 9,000 digits"),
        (f"[{json.dumps(GOOD)},\n{DEEP}]", ":2: cannot be read: lists or objects are nested too deeply, in row 2"),
        (f"[{json.dumps(GOOD)},\n{HALF}]", ": row 2: field 'prompt' holds an unpaired surrogate"),
        (f"[{json.dumps(GOOD)}\n{json.dumps(GOOD)}]", ":2: not JSON: the list does not end behind row 1"),
        (f"[{json.dumps(GOOD)},\n", ":2: not JSON: Expecting value at column 1, in row 2"),
        (f"[{json.dumps(GOOD)},\n]", ":2: not JSON: Expecting value"),
        (f"[{json.dumps(GOOD)}]\n[]", ":1: not JSON: the list does not end behind row 1"),
        ("[]", ": no rows"),
        ("oops", ":1: not JSON: Expecting value at column 1"),
        ("7", ": must be a list of objects, is int"),
    ],
)
def test_a_list_in_json(tmp_path: Path, text: str, why: str, refusal: Any) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert f"{path}{why}" in refusal(path)


def test_a_list_in_a_file_of_json_lines_says_so(tmp_path: Path, refusal: Any) -> None:
    path = tmp_path / "t.jsonl"
    for indent in (None, 1):
        path.write_text(json.dumps([GOOD, GOOD], indent=indent))
        assert f"{path}:1: " in refusal(path) and "a file with a list of objects is named .json" in refusal(path)
