"""Files of rows that are almost right: read, or refused in words that name the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from malora_dist.data.tasks import COMPLETION, MULTIPLE_CHOICE, TaskData, load_task
from malora_dist.errors import DataError
from tests.fuzz.mutate import broken_bytes, broken_text, mutated
from tests.fuzz.rows import ANSWERS, LOSSLESS, QUESTIONS, WRITERS, some_rows

REMOVED = ("bad_rows_skipped", "duplicates_removed", "shared_groups_removed")
REMOVED += ("leaked_duplicates_removed", "near_duplicates_removed")
FIELDS: list[dict[str, Any]] = [
    {},
    {"choices": ["A", "B"]},
    {"label": "A"},
    {"prompt": "q.s"},
    {"prompt": "prompt.x", "label": "choices.0"},
    {"response": "prompt"},
    {"prompt": "choices.0"},
]


def damaged(draw: Random, kind: str) -> bytes:
    """A file of this kind with any or with changed rows, changed letters, or changed bytes."""
    rows = draw.choice((QUESTIONS, ANSWERS, some_rows(draw)))
    if draw.random() < 0.5:
        rows = mutated(draw, rows)
    if kind not in (".json", ".jsonl"):
        rows = [row for row in rows if isinstance(row, dict)]
    content = WRITERS[kind](rows, draw)
    if kind != ".parquet" and draw.random() < 0.4:
        content = broken_text(draw, content.decode(**LOSSLESS)).encode(**LOSSLESS)
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


@pytest.mark.parametrize("kind", WRITERS)
def test_rows(kind: str, draws: Iterator[Random], tmp_path: Path) -> None:
    taken = 0
    for number, draw in enumerate(draws):
        path = tmp_path / f"rows-{number}{kind}"
        path.write_bytes(damaged(draw, kind))
        try:
            task = read(draw, path)
        except DataError as error:
            said = str(error)
            assert said.startswith(("task 't': ", str(path))) and said.encode("utf-8"), said
            assert all(len(line) < 2500 for line in said.splitlines()), said
        else:
            taken += 1
            check(task, path)
        path.unlink()
    assert taken


def check(task: TaskData, path: Path) -> None:
    rows = (*task.train, *task.test)
    assert task.counts["rows_read"] == sum(task.counts[name] for name in REMOVED) + len(rows)
    for example in rows:
        assert example.prompt.strip() and example.response.strip() and example.source.startswith(str(path))
        assert example.label is None or example.choices[example.label] == example.response
        json.dumps([example.prompt, example.response, *example.choices], ensure_ascii=False).encode("utf-8")
