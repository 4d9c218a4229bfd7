"""Files of rows that are almost right: read, or refused in words that name the file."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from malora_dist.data.tasks import COMPLETION, MULTIPLE_CHOICE, TaskData, load_task
from malora_dist.errors import DataError
from tests.fuzz.mutate import broken_bytes, broken_text, mutated

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
FIELDS: list[dict[str, Any]] = [
    {},
    {"choices": ["A", "B"]},
    {"label": "A"},
    {"prompt": "q.s"},
    {"response": "prompt"},
    {"prompt": "choices.0"},
]


def table(rows: Rows, separator: str) -> str:
    """As csv writes it; a cell that is no text is the JSON of it."""
    written, names = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(written, delimiter=separator)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return written.getvalue()


def as_parquet(rows: Rows) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), written)
    return written.getvalue()


TEXTS: dict[str, Callable[[Rows], str]] = {
    ".json": lambda rows: json.dumps(rows, indent=1),
    ".jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    ".csv": lambda rows: table(rows, ","),
    ".tsv": lambda rows: table(rows, "\t"),
}


def damaged(draw: Random, kind: str) -> bytes:
    """A file of this kind with changed rows, changed letters, or changed bytes."""
    rows = draw.choice((QUESTIONS, ANSWERS))
    changed = mutated(draw, rows) if draw.random() < 0.5 else rows
    if kind == ".parquet":
        try:
            content = as_parquet(changed)
        except (pa.ArrowException, AttributeError, TypeError, OverflowError, UnicodeError):
            content = as_parquet(rows)
    else:
        changed = [row for row in changed if isinstance(row, dict)] if kind in (".csv", ".tsv") else changed
        text = TEXTS[kind](changed)
        text = broken_text(draw, text) if draw.random() < 0.5 else text
        content = text.encode("utf-8", "surrogatepass")
    return broken_bytes(draw, content) if draw.random() < 0.3 else content


def read(draw: Random, path: Path) -> TaskData:
    """The file as the training rows of some task."""
    return load_task(
        name="t",
        train=str(path),
        test_size=draw.choice((None, 1, 0.5)),
        group_by=draw.choice((None, None, "group", "q")),
        kind=draw.choice((None, None, COMPLETION, MULTIPLE_CHOICE)),
        fields={role: role for role in ("prompt", "choices", "label", "response")} | draw.choice(FIELDS),
        choices=draw.choice((None, None, ("yes", "no"))),
        first_label=draw.choice((0, 1)),
        template_fields=draw.choice(((), ("A",))),
        optional_fields=draw.choice(((), ("A",))),
        on_bad_row=draw.choice(("error", "skip", "skip")),
    )


@pytest.mark.parametrize("kind", [*TEXTS, ".parquet"])
def test_rows(kind: str, draws: Iterator[Random], tmp_path: Path) -> None:
    taken = 0
    for number, draw in enumerate(draws):
        path = tmp_path / f"rows-{number}{kind}"
        path.write_bytes(damaged(draw, kind))
        try:
            task = read(draw, path)
        except DataError as error:
            said = str(error)
            assert said.startswith(("task 't': ", str(path))) and len(said) < 5000, said
        else:
            taken += 1
            for example in (*task.train, *task.test):
                assert example.prompt.strip() and example.response.strip() and example.source.startswith(str(path))
                assert example.label is None or example.choices[example.label] == example.response
                json.dumps([example.prompt, example.response, *example.choices]).encode()
        path.unlink()
    assert taken
