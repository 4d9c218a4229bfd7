"""Files to examples: every format reads alike, and every kind of bad row names file, line and field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from malora_dist.data.tasks import Example, load_task
from malora_dist.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "007, größer als 7?", "choices": ["no", "yes"], "label": 0},
    {"prompt": 'He said: "a,\nb"', "choices": ["NA", "None", "x"], "label": 2},
]
GOOD = {"prompt": "good", "choices": ["no", "yes"], "label": 1}


def write_csv(path: Path, separator: str = ",") -> None:
    quoted = [[row["prompt"], json.dumps(row["choices"]), str(row["label"])] for row in ROWS]
    lines = [["prompt", "choices", "label"], *quoted]
    path.write_text("".join(separator.join('"' + c.replace('"', '""') + '"' for c in line) + "\n" for line in lines))


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_give_the_same_examples(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    first, second = load_task(name="t", train=str(path)).train
    assert (first.prompt, first.choices, first.label, first.response) == ("007, größer als 7?", ("no", "yes"), 0, "no")
    assert (second.prompt, second.choices, second.response) == ('He said: "a,\nb"', ("NA", "None", "x"), "x")
    assert second.source == f"{path}:3" if name == "rows.jsonl" else f"{path}: row 2"


@pytest.mark.parametrize(
    ("choices", "label", "expected"),
    [
        (["no", "yes"], 1, 1),
        (["no", "yes"], "B", 1),
        (["no", "yes"], " yes", 1),
        (["no", "yes"], "0", 0),
        (["B", "A"], "B", 0),  # a choice's text goes before a letter
        (["2", "1"], "1", 1),  # and before a number
        ({"text": ["B", "A", "AB", "O"], "label": ["A", "B", "C", "D"]}, "B", 1),  # but not before a key
        ({"text": ["no", "yes"], "label": ["1", "2"]}, "2.0", 1),
        ({"text": ["no", "yes"], "label": ["1", "2"]}, "2", 1),  # a key goes before a number
        ([{"text": "no", "label": "x"}, {"text": "yes", "label": "y"}], "y", 1),
        ({"text": ["no", "yes"], "label": [1, 2]}, 1, 0),  # also of a number
        ({"text": ["no", "yes"], "label": ["A", "B"]}, 1, 1),
        ('["no", "yes"]', 1, 1),
        (["no", "yes"], 1.0, 1),  # a whole column is of fractions where one number is missing
        (["no", "yes"], "1.0", 1),
        (["no", "yes"], True, 1),
        (["Yes", "No"], True, 0),
        (["no", "yes"], "False", 0),
        (["maybe", "true", "false"], False, 2),
    ],
)
def test_ways_to_write_a_label(write_jsonl: Any, choices: Any, label: Any, expected: int) -> None:
    path = write_jsonl("t.jsonl", [{"prompt": "p", "choices": choices, "label": label}])
    assert load_task(name="t", train=path).train[0].label == expected


@pytest.mark.parametrize(
    ("choices", "labels", "two_meanings", "from_1"),
    [
        (["no", "yes"], [0, 1, "0", "B", "yes", "1.0", True], 0, 0),
        ({"text": ["3", "4", "2", "1"], "label": ["1", "2", "3", "4"]}, ["3", 4], 2, 0),
        (["3", "4", "1", "2"], ["1", "4", "1.0"], 2, 1),
        (["B", "A", "AB"], ["B", "C", "AB"], 1, 0),
        (["0", "1", "2"], ["0", 1, "2"], 0, 0),
        (["1", "2", "3", "4", "5"], [1, 2, 3], 3, 3),
        (["1", "2", "3", "4", "5"], ["1", "2", "5"], 2, 0),
        (["w", "x", "y", "z"], [1, "2", 3.0], 0, 3),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_counted(
    write_jsonl: Any, choices: Any, labels: list[Any], two_meanings: int, from_1: int
) -> None:
    rows = [{"prompt": f"p{number}", "choices": choices, "label": label} for number, label in enumerate(labels)]
    counts = load_task(name="t", train=write_jsonl("t.jsonl", rows)).counts
    assert (counts.get("labels_of_two_meanings", 0), counts.get("labels_from_1", 0)) == (two_meanings, from_1)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "missing prompt": ({"choices": ["a", "b"], "label": 0}, "field 'prompt' is missing"),
    "null prompt": ({**GOOD, "prompt": None}, "field 'prompt' is null"),
    "empty prompt": ({**GOOD, "prompt": " \n"}, "field 'prompt' is empty"),
    "wrong type": ({**GOOD, "prompt": 7.5}, "field 'prompt' must be text, is float 7.5"),
    "truth for text": ({**GOOD, "prompt": True}, "field 'prompt' must be text, is bool True"),
    "missing label": ({"prompt": "p", "choices": ["a", "b"]}, "field 'label' is missing"),
    "label too large": ({**GOOD, "label": 2}, "field 'label': 2 is not among the 2 choices"),
    "label negative": ({**GOOD, "label": -1}, "field 'label': -1 is not among"),
    "label letter too far": ({**GOOD, "label": "C"}, "field 'label': 'C' is not among"),
    "label beside keys": (
        {**GOOD, "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "label": 0},
        "field 'label': 0 is not among",
    ),
    "label text unknown": ({**GOOD, "label": "maybe"}, "field 'label': 'maybe' is not among"),
    "label that is a text beside numbers": ({**GOOD, "choices": ["1", "2"], "label": 2}, "field 'label': 2 is not"),
    "label true": ({**GOOD, "choices": ["a", "b"], "label": True}, "field 'label': True is not among the 2 choices"),
    "label fraction": ({**GOOD, "label": 1.5}, "field 'label' must be a number, a letter or a choice, is float 1.5"),
    "choices no list": ({**GOOD, "choices": "no, yes"}, "field 'choices' must be a list"),
    "choices not text": ({**GOOD, "choices": [1.5, 2]}, "field 'choices' must be a list of texts"),
    "choices true": ({**GOOD, "choices": [True, False]}, "field 'choices' must be a list of texts"),
    "one choice": ({**GOOD, "choices": ["no"]}, "field 'choices' must hold 2 to 26 choices, holds 1"),
    "empty choice": ({**GOOD, "choices": ["no", ""]}, "field 'choices' holds an empty choice"),
    "repeated choice": ({**GOOD, "choices": ["no", "yes", "no "]}, "field 'choices' holds the choice 'no' twice"),
    "no object": (["p", "r"], "must be an object with fields, is list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(name: str, write_jsonl: Any) -> None:
    row, message = BAD_ROWS[name]
    path = write_jsonl("t.jsonl", [GOOD, row])
    with pytest.raises(DataError) as error:
        load_task(name="t", train=path)
    assert f"{path}:2: {message}" in str(error.value)
    task = load_task(name="t", train=path, on_bad_row="skip")
    assert (len(task.train), task.counts["bad_rows_skipped"], task.counts["rows_read"]) == (1, 1, 2)


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"prompt": "p", "response": " "}, {"prompt": "p", "response": 5.5}])
def test_bad_responses_of_completions(row: dict[str, Any], write_jsonl: Any) -> None:
    path = write_jsonl("t.jsonl", [{"prompt": "q", "response": "r"}, row])
    with pytest.raises(DataError, match=r"t\.jsonl:2: field 'response'"):
        load_task(name="t", train=path)


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff", "response": "r"}\n{broken\n')
    with pytest.raises(DataError) as error:
        load_task(name="t", train=str(lines))
    assert f"{lines}:2: invalid UTF-8 at byte 12" in str(error.value)
    assert f"{lines}:3: not JSON" in str(error.value)
    table = tmp_path / "t.csv"
    table.write_bytes("prompt,response\nfine \N{REPLACEMENT CHARACTER}?,r\n".encode())
    assert len(load_task(name="t", train=str(table)).train) == 1
    table.write_bytes(b"prompt,response\ngood,r\nb\xe4d,r\n")
    with pytest.raises(DataError, match=r"t\.csv: row 2: invalid UTF-8"):
        load_task(name="t", train=str(table))
    assert load_task(name="t", train=str(table), on_bad_row="skip").counts["bad_rows_skipped"] == 1


def test_files_that_cannot_be_used(tmp_path: Path, write_jsonl: Any) -> None:
    def message(train: str, **options: Any) -> str:
        with pytest.raises(DataError) as error:
            load_task(name="t", train=train, **options)
        return str(error.value)

    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "broken.json").write_text('[{"prompt": 1},\n oops]')
    assert "nothing.jsonl: no such file" in message(str(tmp_path / "nothing.jsonl"))
    assert "*.none: no file matches this pattern" in message(str(tmp_path / "*.none"))
    for name, problem in {"nothing.jsonl": "no such file", "*.none": "no file matches this pattern"}.items():
        assert (
            message(name)
            == f"task 't': {name}: {problem} (relative to {Path.cwd()}, the folder that the command runs in)"
        )
    assert "is a folder" in message(str(tmp_path))
    assert "empty.jsonl: the file is empty" in message(str(tmp_path / "empty.jsonl"))
    assert "blank.jsonl: no rows" in message(str(tmp_path / "blank.jsonl"))
    assert "broken.parquet: cannot be read as parquet" in message(str(tmp_path / "broken.parquet"))
    assert "broken.json:2: not JSON" in message(str(tmp_path / "broken.json"))
    assert "all 1 rows are bad" in message(write_jsonl("bad.jsonl", [{}]), on_bad_row="skip")
    (tmp_path / "t.txt").write_text("x")
    assert "unknown kind of file" in message(str(tmp_path / "t.txt"))


def test_globs_lists_and_names_with_brackets(write_jsonl: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(3)]
    write_jsonl("b.part.jsonl", rows[1:2])
    write_jsonl("a.part.jsonl", rows[0:1])
    last = write_jsonl("[1].jsonl", rows[2:3])
    task = load_task(name="t", train=[str(tmp_path / "*.part.jsonl"), last])
    assert [example.prompt for example in task.train] == ["p0", "p1", "p2"]


def test_own_field_names_and_fields_for_the_template(write_jsonl: Any) -> None:
    row = {"question": "q", "options": ["a", "b"], "gold": 1, "passage": "text", "id": 3}
    path = write_jsonl("t.jsonl", [row, {**row, "question": "r", "passage": None}])
    options: dict[str, Any] = {
        "fields": {"prompt": "question", "choices": "options", "label": "gold", "response": "response"},
        "template_fields": ("passage",),
        "group_by": "id",
    }
    with pytest.raises(DataError, match=r"t\.jsonl:2: field 'passage' is null"):
        load_task(name="t", train=path, **options)
    example = load_task(name="t", train=path, on_bad_row="skip", **options).train[0]
    assert example == Example("t", "q", "b", ("a", "b"), 1, "3", f"{path}:1", {"passage": "text"})


def test_splits_are_clean_and_counted(write_jsonl: Any) -> None:
    long = "the quick brown fox jumps over the lazy dog near the old river bank in the morning sun number"
    train = [{"prompt": f"question {i} about topic {i}", "response": "r"} for i in range(20)]
    train += [train[3], {"prompt": f"{long} one", "response": "r"}, {"prompt": "Question, Shared!", "response": "r"}]
    test = [{"prompt": f"{long} two", "response": "r"}, {"prompt": "question shared", "response": "r"}]
    paths = {"train": write_jsonl("train.jsonl", train), "test": write_jsonl("test.jsonl", test)}
    task = load_task(name="t", **paths, validation_size=5, max_train_samples=8)
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 5, 2)
    assert task.counts == {
        "rows_read": 25,
        "bad_rows_skipped": 0,
        "duplicates_removed": 1,
        "shared_groups_removed": 0,
        "leaked_duplicates_removed": task.counts["leaked_duplicates_removed"],
        "near_duplicates_removed": task.counts["near_duplicates_removed"],
        "over_the_cap": task.counts["over_the_cap"],
        "train": 8,
        "validation": 5,
        "test": 2,
    }
    cut = {example.prompt for example in task.validation}
    assert task.counts["leaked_duplicates_removed"] == 1 - ("Question, Shared!" in cut)
    assert task.counts["near_duplicates_removed"] == 1 - (f"{long} one" in cut)
    assert sum(task.counts[name] for name in task.counts if name != "rows_read") == task.counts["rows_read"]


def test_train_that_repeats_test_entirely_is_refused(write_jsonl: Any) -> None:
    path = write_jsonl("t.jsonl", [GOOD])
    with pytest.raises(
        DataError, match="every training row: 1 equal to one; none is left. Are train and test the same"
    ):
        load_task(name="t", train=path, test=path)


def test_of_many_bad_rows_the_first_are_named(write_jsonl: Any) -> None:
    with pytest.raises(DataError, match=r"leaves them out\), the first 5:\n") as error:
        load_task(name="t", train=write_jsonl("t.jsonl", [{}] * 7))
    assert len(str(error.value).splitlines()) == 6


def test_letters_need_choices(write_jsonl: Any) -> None:
    path = write_jsonl("t.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(DataError, match="scoring=letter needs rows with choices"):
        load_task(name="t", train=path, scoring="letter")
