"""Rows as people have them and as they break readers, and files of them in every format."""

import csv
import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.fuzz.mutate import ODD

TEXTS = ("red", " a,b ", '"', "'", "\n", "\r", "\t", "\x00", "é", "\ud83d", "\ufeff", "1.0", "NaN", "True", "B", "2")
TEXTS += ("[", '["a", "b"]', '["2", "1"]', "\\", "7" * 5000, "</s>", "007", "-1")
VALUES: tuple[Any, ...] = (
    *ODD,
    *TEXTS,
    2,
    1.0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    ["a", "b"],
    ["a", "a"],
    [1, 2],
)
VALUES += ({"text": ["a", "b"], "label": ["x", "y"]}, [{"text": "a"}, {"text": "b"}], {"text": "a"}, [[[["a"]]]])
NAMES = ("prompt", "choices", "label", "response", "A", "B", "", "prompt.x", "é")

Rows = list[dict[str, Any]]
QUESTIONS: Rows = [
    {
        "prompt": f"How many is {n}?",
        "choices": ["one", "zwölf", f"{n}"],
        "label": n % 3,
        "A": "a",
        "B": "b",
        "q": {"s": "t"},
    }
    for n in range(6)
]
ANSWERS: Rows = [{"prompt": f"Say {n}", "response": f"世 {n}", "label": None, "group": n % 2} for n in range(6)]


def some_rows(draw: Random) -> Rows:
    """Rows with any values in some fields, of which half are right where it counts."""
    return [
        {name: draw.choice(VALUES) for name in draw.sample(NAMES, draw.randint(1, len(NAMES)))}
        | ({"prompt": f"p {draw.random()}", "choices": ["a", "b"], "label": 1} if draw.random() < 0.5 else {})
        for _ in range(draw.randint(1, 4))
    ]


def json_lines(rows: Rows, draw: Random) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows).encode(**LOSSLESS)


def json_list(rows: Rows, draw: Random) -> bytes:
    return json.dumps(rows, indent=draw.choice([None, 1])).encode()


def table(rows: Rows, _: Random, separator: str = ",") -> bytes:
    """As csv writes it; a cell that is no text is the JSON of it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    csv.writer(file, delimiter=separator).writerows(
        [cell if isinstance(cell, str) else json.dumps(cell) for cell in line] for line in lines
    )
    return file.getvalue().encode(**LOSSLESS)


def columns(rows: Rows, draw: Random) -> bytes:
    """Of the types that Arrow sees in the rows, or of any that hold what fits them."""
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except (pyarrow.ArrowException, AttributeError, TypeError, OverflowError, UnicodeError):
        names = list(dict.fromkeys(name for row in rows for name in row))
        kinds = [draw.choice(KINDS) if draw.random() < 0.3 else USUAL.get(name, pyarrow.string()) for name in names]
        cells = zip(names, kinds, strict=True)
        arrays = [pyarrow.array([_fitting(kind, row.get(name)) for row in rows], kind) for name, kind in cells]
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), file)
    return file.getvalue()


def _fitting(kind: Any, value: Any) -> Any:
    # Arrow itself ends the process over what is no map.
    if pyarrow.types.is_map(kind):
        return [("a", 1)]
    try:
        return pyarrow.scalar(value, kind).as_py()
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return None


LOSSLESS: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogatepass"}
KINDS = (
    pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.int64(), pyarrow.float64(),
    pyarrow.bool_(), pyarrow.list_(pyarrow.string()), pyarrow.map_(pyarrow.string(), pyarrow.int64()),
    pyarrow.timestamp("ms"), pyarrow.date32(), pyarrow.binary(), pyarrow.null(),
)  # fmt: skip
USUAL = {"choices": pyarrow.list_(pyarrow.string()), "label": pyarrow.int64()}
WRITERS: dict[str, Callable[[Rows, Random], bytes]] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": table,
    ".tsv": lambda rows, draw: table(rows, draw, "\t"),
    ".parquet": columns,
}
