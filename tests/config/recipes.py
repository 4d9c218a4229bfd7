"""A small valid recipe for the tests of this folder."""

from typing import Any


def recipe(**sections: dict[str, Any]) -> dict[str, Any]:
    """A valid recipe as a mapping; `adapter={"r": 4}` adds keys to a section."""
    base: dict[str, Any] = {
        "model": {"name_or_path": "some/model"},
        "data": {
            "tasks": [{"name": "boolq", "train": "boolq.jsonl"}, {"name": "piqa", "train": ["a.jsonl", "b.jsonl"]}]
        },
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base
