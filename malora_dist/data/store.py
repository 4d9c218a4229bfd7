"""Tokenised splits as a folder of flat arrays, read back through memory maps, so that ranks share one copy."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from malora_dist.data.encode import ChoiceItem, Sample

Array = npt.NDArray[Any]
FORMAT_VERSION = 1


class SampleStore(Sequence[Sample]):
    """Samples of one task, one flat array of ids; `store[i]` is a view without a copy."""

    def __init__(self, ids: Array, offsets: Array, prompt_lengths: Array, task_id: int, first_id: int = 0) -> None:
        self._ids, self._offsets, self._prompt_lengths = ids, offsets, prompt_lengths
        self.task_id, self.first_id = task_id, first_id

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def lengths(self) -> Array:
        """Count the tokens of each sample."""
        return np.diff(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        ids = self._ids[self._offsets[number] : self._offsets[number + 1]]
        return Sample(self.first_id + number, self.task_id, ids, int(self._prompt_lengths[number]))


class TrainStore(Sequence[Sample]):
    """Samples of all tasks behind one another: `store[sample_id]`, tasks in order of their id."""

    def __init__(self, tasks: Sequence[SampleStore]) -> None:
        self._tasks = tuple(tasks)
        self._starts = np.cumsum([0, *map(len, tasks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self, task_id: int) -> Array:
        """Count the tokens of each sample of a task."""
        return self._tasks[task_id].lengths()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        task = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._tasks[task][number - int(self._starts[task])]


@dataclass(frozen=True)
class TaskTokens:
    """One tokenised task. Evaluation splits hold ChoiceItems where there are choices, else Samples.

    `digests` has one for each split; it changes with the split's rows, and with nothing else.
    """

    kind: str
    scoring: str
    train: SampleStore
    evaluation: dict[str, list[ChoiceItem] | list[Sample]]
    counts: dict[str, int]
    digests: dict[str, str]


def split_digest(folder: Path, name: str) -> str:
    """Return the SHA-256 of what `write_samples` or `write_choice_items` wrote under that name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(f"{name}.*.npy")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_samples(folder: Path, name: str, samples: Sequence[Sample]) -> None:
    """Write the files {name}.ids.npy, {name}.offsets.npy and {name}.prompts.npy."""
    _write_ragged(folder, name, [sample.input_ids for sample in samples])
    _save(folder, f"{name}.prompts", np.asarray([sample.prompt_length for sample in samples], dtype=np.int32))


def read_samples(folder: Path, name: str, *, task_id: int, first_id: int = 0) -> SampleStore:
    """Read the store that `write_samples` wrote; sample ids count from `first_id`."""
    ids, offsets = _load(folder, f"{name}.ids"), _load(folder, f"{name}.offsets")
    return SampleStore(ids, offsets, _load(folder, f"{name}.prompts"), task_id, first_id)


def write_choice_items(folder: Path, name: str, items: Sequence[ChoiceItem]) -> None:
    """Write prompts and choices as ragged arrays, and {name}.items.npy with (number of choices, label) of each item."""
    _write_ragged(folder, f"{name}.prompt", [item.prompt_ids for item in items])
    _write_ragged(folder, f"{name}.choice", [ids for item in items for ids in item.choice_ids])
    _save(folder, f"{name}.lengths", np.asarray([n for item in items for n in item.choice_lengths], dtype=np.int32))
    pairs = [(len(item.choice_ids), item.label) for item in items]
    _save(folder, f"{name}.items", np.asarray(pairs, dtype=np.int32).reshape(-1, 2))


def read_choice_items(folder: Path, name: str, *, task_id: int) -> list[ChoiceItem]:
    """Read the items that `write_choice_items` wrote."""
    choices = _read_ragged(folder, f"{name}.choice")
    lengths = iter(_load(folder, f"{name}.lengths").tolist())
    items = []
    for prompt, (count, label) in zip(
        _read_ragged(folder, f"{name}.prompt"), _load(folder, f"{name}.items").tolist(), strict=True
    ):
        ids = tuple(next(choices) for _ in range(count))
        items.append(ChoiceItem(task_id, prompt, ids, tuple(next(lengths) for _ in range(count)), label))
    return items


def write_summary(folder: Path, **values: Any) -> None:
    """Write summary.json, which holds what is no array. It is written last, so a folder with it is complete."""
    (folder / "summary.json").write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """Read what `write_summary` wrote."""
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return values


def _write_ragged(folder: Path, name: str, rows: Sequence[Sequence[int] | Array]) -> None:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.empty(0, np.int32)
    _save(folder, f"{name}.ids", flat)
    _save(folder, f"{name}.offsets", offsets)


def _read_ragged(folder: Path, name: str) -> Iterator[tuple[int, ...]]:
    ids, offsets = _load(folder, f"{name}.ids").tolist(), _load(folder, f"{name}.offsets").tolist()
    return (tuple(ids[start:end]) for start, end in zip(offsets, offsets[1:], strict=False))


def _save(folder: Path, name: str, array: Array) -> None:
    np.save(folder / f"{name}.npy", array)


def _load(folder: Path, name: str) -> Array:
    path = folder / f"{name}.npy"
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    # A plain view: each slice of a np.memmap costs microseconds of Python.
    return array.view(np.ndarray)
