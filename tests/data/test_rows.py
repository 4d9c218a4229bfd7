"""Every file gives the rows that are in it, or says file, line and field of what is wrong with it."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from malora_dist.data.example import Example
from malora_dist.data.rows import read_rows
from malora_dist.data.tasks import load_task
from malora_dist.errors import DataError

GOOD = {"prompt": "good", "response": "r"}
HALF = '{"prompt": "The wall is red \\ud83d.", "response": "r"}'
DEEP = f'{{"prompt": {"[" * 9000}{"]" * 9000}, "response": "r"}}'
LONG = f'{{"prompt": {"7" * 9000}, "response": "r"}}'


def message(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_task(name="t", train=str(path), **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (HALF, r"field 'prompt' holds half a character, '\ud83d', at place 17"),
        (DEEP, "cannot be read: lists or objects are nested too deeply"),
        (LONG, "field 'prompt' must be text, is a number of 9,000 digits"),
        ('{"prompt": "p", "prompt": "q", "response": "r"}', "must be an object with fields, is an object that gives"),
        ('{"prompt": "p", "response": "r"} {}', "not JSON: more follows behind the value, at place 34"),
        ('{"prompt": NaN, "response": "r"}', "field 'prompt' is null"),
        ('{"prompt": [[[[[[[[[["p"]]]]]]]]]], "response": "r"}', "field 'prompt' must be text, is list [[[["),
    ],
)
def test_a_bad_line_of_json_is_named_or_skipped(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    assert f"{path}:2: {why}" in message(path)
    assert load_task(name="t", train=str(path), on_bad_row="skip").counts["bad_rows_skipped"] == 1


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ('["\\ud83d", "b"]', r"field 'choices' holds half a character, '\ud83d', at place 1"),
        (f'"{"[" * 9000}"', "field 'choices' must be a list, or a JSON list as text"),
        ('{"text": "ab", "label": [1, 2]}', "field 'choices' must be a list of texts, is str 'ab'"),
    ],
)
def test_bad_choices_in_json(tmp_path: Path, choices: str, why: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"prompt": "p", "choices": {choices}, "label": 0}}\n')
    assert f"{path}:1: {why}" in message(path)


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
        (f"[{json.dumps(GOOD)},\n{HALF}]", ": row 2: field 'prompt' holds half a character"),
        (f"[{json.dumps(GOOD)}\n{json.dumps(GOOD)}]", ":2: not JSON: the list does not end behind row 1"),
        (f"[{json.dumps(GOOD)},\n", ":2: not JSON: Expecting value at column 1, in row 2"),
        (f"[{json.dumps(GOOD)},\n]", ":2: not JSON: Expecting value"),
        (f"[{json.dumps(GOOD)}]\n[]", ":1: not JSON: the list does not end behind row 1"),
        ("[]", ": no rows"),
        ("oops", ":1: not JSON: Expecting value at column 1"),
        ("7", ": must be a list of objects, is int"),
    ],
)
def test_a_list_in_json(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert f"{path}{why}" in message(path)


def test_a_list_in_a_file_of_json_lines_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for indent in (None, 1):
        path.write_text(json.dumps([GOOD, GOOD], indent=indent))
        assert f"{path}:1: " in message(path) and "a file with a list of objects is named .json" in message(path)


def test_a_table_as_pandas_writes_it(tmp_path: Path) -> None:
    """Its first column has no name and holds the row's number."""
    path = tmp_path / "t.csv"
    path.write_text(',prompt,response\n0,Spell 0,0 0\n1,"a, b",1 1\n\n2,Spell 2,2 2\n')
    rows = load_task(name="t", train=str(path)).train
    assert [(row.prompt, row.response) for row in rows] == [("Spell 0", "0 0"), ("a, b", "1 1"), ("Spell 2", "2 2")]
    assert rows[2].source == f"{path}: row 3"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (",,,\n,,,\n", ":1: the first line must name the columns, all its 4 cells are empty"),
        ("prompt,response,prompt\na,b,c\n", ": two columns have the name 'prompt'"),
        ("prompt,response\n", ": no rows"),
        ("prompt,response\na,b\nc,d,e\n", ": row 2: has 3 cells where the first line names 2 columns"),
        ("prompt,response\na,b\nc\n", ": row 2: has 1 cells where the first line names 2 columns"),
        ("prompt,response\n,\n", ": row 1: field 'prompt' is empty"),
        ('prompt,response\na,b\n"c,d\ne,f\n', ": row 2: cannot be read, from line 3 on: unexpected end of data"),
        ('prompt,response\n"a"x,b\n', ": row 1: cannot be read, from line 2 on: ',' expected after '\"'"),
        (
            "question;answer\na;b\n",
            ": row 1: field 'prompt' is missing; the row has ['question;answer'] (`fields: {prompt",
        ),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert f"{path}{why}" in message(path)


def test_a_cell_may_be_long_and_hold_anything(tmp_path: Path) -> None:
    path, long = tmp_path / "t.tsv", "x" * 200_000
    path.write_text(f'prompt\tresponse\n{long}\t"tab\tand\nline"\n')
    (row,) = load_task(name="t", train=str(path)).train
    assert (row.prompt, row.response) == (long, "tab\tand\nline") and csv.field_size_limit() == 131_072


def test_a_column_of_parquet_with_a_number_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    columns = {"prompt": ["p", "q", "r"], "A": ["a"] * 3, "B": ["b"] * 3, "C": ["c", None, ""]}
    for missing in (None, float("nan")):
        table = pyarrow.table({**columns, "label": pyarrow.array([1.0, missing, 0.0], from_pandas=missing is None)})
        parquet.write_table(table, path)
        fields = {"prompt": "prompt", "choices": ("A", "B", "C"), "label": "label", "response": "response"}
        assert f"{path}: row 2: field 'label' is null" in message(path, fields=fields)
        rows = load_task(name="t", train=str(path), fields=fields, on_bad_row="skip").train
        assert [(row.label, row.choices) for row in rows] == [(1, ("a", "b", "c")), (0, ("a", "b"))]


def test_a_value_of_parquet_that_python_cannot_hold_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    broken = pyarrow.array([b"fine", b"b\xff", b"fine too"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": broken, "response": ["r"] * 3}), path)
    assert f"{path}: row 2: invalid UTF-8" in message(path)
    parquet.write_table(pyarrow.table([["p"], ["q"]], names=["prompt", "prompt"]), path)
    assert f"{path}: two columns have the name 'prompt'" in message(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message(path) == f"task 't': {path}: cannot be read: Permission denied"


# What people's rows hold, and what breaks readers.
TEXTS = [
    "red",
    "",
    " ",
    "a,b",
    '"',
    "'",
    "\n",
    "\r",
    "\t",
    "{x}",
    "\x00",
    "é",
    "日本",
    "\ud83d",
    "\ufeff",
    "0",
    "1.0",
    "NaN",
]
TEXTS += ["True", "B", "null", "[", '["a", "b"]', "\\", "\u2028", "7" * 5000, "-1", "</s>"]
VALUES = [
    *TEXTS,
    None,
    True,
    False,
    0,
    1,
    1.0,
    1.5,
    -1,
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    ["a", "b"],
    ["a", "a"],
]
VALUES += [
    ["a", None],
    {"text": ["a", "b"], "label": ["x", "y"]},
    {"text": "a"},
    [{"text": "a"}, {"text": "b"}],
    [[[["a"]]]],
]
NAMES = ["prompt", "choices", "label", "response", "A", "B", "", "prompt.x", "é"]
PIECES = [
    b"\xff",
    b"\x00",
    b'"',
    b"\n",
    b",",
    b"{",
    b"]",
    b"\\u",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"1" * 5000,
    b"\r",
    b"\t",
]


def json_lines(rows: list[dict[str, Any]], _: random.Random) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_list(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    return json.dumps(rows, indent=draw.choice([None, 1])).encode()


def table(rows: list[dict[str, Any]], _: random.Random) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    csv.writer(file).writerows([names, *([row.get(name, "") for name in names] for row in rows)])
    return file.getvalue().encode("utf-8", "surrogatepass")


def columns(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = (pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.bool_(), pyarrow.list_(pyarrow.string()))
    arrays = []
    for name in names:
        kind = draw.choice(kinds) if draw.random() < 0.2 else pyarrow.string()
        arrays.append(pyarrow.array([fitting(kind, row.get(name)) for row in rows], kind))
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), file)
    return file.getvalue()


def fitting(kind: Any, value: Any) -> Any:
    try:
        return pyarrow.scalar(value, kind).as_py()
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return None


WRITERS: dict[str, Callable[[list[dict[str, Any]], random.Random], bytes]] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": table,
    ".parquet": columns,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"choices": ("no", "yes")},
    {"kind": "completion"},
    {"fields": {"prompt": "prompt", "choices": ("A", "B"), "label": "label", "response": "response"}, "first_label": 1},
    {"template_fields": ("A",), "optional_fields": ("A",), "group_by": "B"},
]


def a_file(draw: random.Random, suffix: str) -> bytes:
    """Rows that are nearly right, as a file of which some bytes may have been changed."""
    rows = [
        {name: draw.choice(VALUES) for name in draw.sample(NAMES, draw.randint(1, len(NAMES)))}
        | ({"prompt": f"p {draw.random()}", "choices": ["a", "b"], "label": 1} if draw.random() < 0.5 else {})
        for _ in range(draw.randint(1, 4))
    ]
    content = bytearray(WRITERS[suffix](rows, draw))
    for _ in range(draw.choice([0, 0, 1, 3])):
        start = draw.randrange(len(content) + 1)
        content[start : start + draw.choice([0, 0, 1, 40])] = draw.choice(PIECES)
    return bytes(content)


@pytest.mark.parametrize("suffix", WRITERS)
def test_any_file_gives_right_rows_or_an_error_in_words(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(f"rows {suffix}")
    path = tmp_path / f"t{suffix}"
    read = 0
    for _ in range(250):
        path.write_bytes(a_file(draw, suffix))
        options = draw.choice(OPTIONS)
        try:
            examples = load_task(name="t", train=str(path), on_bad_row=draw.choice(["error", "skip"]), **options).train
        except DataError as error:
            assert str(path) in str(error) and str(error).encode("utf-8")
            continue
        assert all(is_usable(example, options) for example in examples)
        read += len(examples)
    assert read > 10


def is_usable(example: Example, options: dict[str, Any]) -> bool:
    texts = [example.prompt, example.response, *example.choices]
    assert all(isinstance(text, str) and text.strip() and text.encode("utf-8") for text in texts)
    assert example.choices == () or example.choices[example.label or 0] == example.response
    return not example.choices or example.choices == options.get("choices", example.choices)


def test_reading_names_each_row_once(tmp_path: Path) -> None:
    draw = random.Random("sources")
    for suffix in WRITERS:
        path = tmp_path / f"t{suffix}"
        path.write_bytes(WRITERS[suffix]([{"prompt": "p", "response": "r"}] * 5, draw))
        sources = [row.source for row in read_rows(path)]
        assert len(set(sources)) == 5 and all(source.startswith(str(path)) for source in sources)
