"""Any file gives the rows that are in it, or says file, line and field of what is wrong with it."""

import csv
import io
import json
import os
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


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}')

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path) == f"task 't': {path}: cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["t.jsonl", "*.jsonl"])
def test_a_file_in_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any, name: str
) -> None:
    """Root may enter all folders, so the system's answer is given for it."""
    (tmp_path / "t.jsonl").write_text('{"prompt": "p", "response": "r"}')
    ask = os.stat

    def refuse(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/t"):
            raise PermissionError(13, "Permission denied", str(path))
        return ask(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert refusal(tmp_path / name) == f"task 't': {tmp_path / name}: cannot be read: Permission denied"


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
# Opening a Parquet file takes as long as ten others.
FILES = {".jsonl": 250, ".json": 250, ".csv": 250, ".parquet": 50}
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
    for _ in range(FILES[suffix]):
        path.write_bytes(a_file(draw, suffix))
        options = draw.choice(OPTIONS)
        try:
            examples = load_task(name="t", train=str(path), on_bad_row=draw.choice(["error", "skip"]), **options).train
        except DataError as error:
            assert str(path) in str(error) and str(error).encode("utf-8")
            continue
        assert all(is_usable(example, options) for example in examples)
        read += len(examples)
    assert read > FILES[suffix] // 25


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
