"""Files are found and opened, or named; every row has a name of its own."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from malora_dist.data.rows import read_rows
from tests.fuzz.rows import WRITERS


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


def test_reading_names_each_row_once(tmp_path: Path) -> None:
    draw = random.Random("sources")
    for suffix in WRITERS:
        path = tmp_path / f"t{suffix}"
        path.write_bytes(WRITERS[suffix]([{"prompt": "p", "response": "r"}] * 5, draw))
        sources = [row.source for row in read_rows(path)]
        assert len(set(sources)) == 5 and all(source.startswith(str(path)) for source in sources)
