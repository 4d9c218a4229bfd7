"""A small valid recipe, and the folder of those that ship with the package."""

from pathlib import Path
from typing import Any

import malora_dist.recipes

RECIPES = Path(malora_dist.recipes.__file__).parent


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
