"""metrics.jsonl: the numbers of a run, one JSON record a line, and the names they go by.

Every record has a `kind`: "run" (facts, at each start), "train" (a log step), "eval" (validation while training),
"routing" (which experts the tasks' tokens went to), "checkpoint" (one was saved) or "resume" (training went on after
`step`). A run that goes on takes the records of lost work out, so that each step's is there once; in files of earlier
versions, records of later steps before a "resume" are of steps that were lost. JSON has no NaN and no infinity: they
are written as the strings "nan", "inf" and "-inf", and become numbers again when read.
"""

import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from malora_dist.errors import MaloraError
from malora_dist.files.atomic import write_bytes
from malora_dist.files.json_text import parse_json

Record = dict[str, Any]

KIND = "kind"
RUN = "run"
TRAIN = "train"
EVAL = "eval"
ROUTING = "routing"
CHECKPOINT = "checkpoint"
RESUME = "resume"

# A "run" record. Parameters are counts over all processes.
WORLD_SIZE = "world_size"
MAX_STEPS = "max_steps"
DEVICE = "device"
BASE_DTYPE = "base_dtype"
TRAINABLE_PARAMETERS = "trainable_parameters"
BASE_PARAMETERS = "base_parameters"
# Bytes of the frozen base and of the adapter that the main process keeps.
RESIDENT_BYTES = "resident_bytes"

# A "train" record. Losses are nats per supervised token, grad_norm is before clipping.
STEP = "step"
EPOCH = "epoch"
LOSS = "loss"
AUX_LOSS = "aux_loss"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "learning_rate"
TOKENS_PER_SECOND = "tokens_per_second"
STEP_SECONDS = "step_seconds"
PEAK_MEMORY_GIB = "peak_memory_gib"
# Only with expert parallelism: bytes all processes send for it, per step.
EXCHANGE_BYTES = "exchange_bytes"

# A "checkpoint" record: bytes of all files, seconds until it is finished, and of these those in which training waited.
# Both are missing where the process was killed before it wrote them.
BYTES = "bytes"
SECONDS = "seconds"
STALL_SECONDS = "stall_seconds"

# A "routing" record: SHARE[task][layer] is a list of num_experts numbers that sum to 1.
TASKS = "tasks"
SHARE = "share"

_TEXT_KEYS = (KIND, TASKS, DEVICE, BASE_DTYPE, CHECKPOINT)
_NON_FINITE = ("nan", "inf", "-inf")


def train_loss(task: str) -> str:
    """Return the name of a task's training loss in a "train" record; absent where the task had no token."""
    return f"train/{task}/loss"


def eval_accuracy(task: str) -> str:
    """Return the name of a task's accuracy in an "eval" record, from 0 to 1."""
    return f"eval/{task}/accuracy"


def eval_loss(task: str) -> str:
    """Return the name of a task's validation loss in an "eval" record."""
    return f"eval/{task}/loss"


def eval_score(metric: str) -> str:
    """Return the name of the number in an "eval" record that train.best_metric compares."""
    return f"eval/{metric}"


class MetricsWriter:
    """Appends records to a file, each one flushed, so that a crash costs at most the last line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(path)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises ValueError if it has no `kind`."""
        if KIND not in record:
            raise ValueError(f"a metrics record needs {KIND!r}: {dict(record)}")
        self._file.write(json.dumps(_spell_non_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def cut(self, step: int, again: Collection[str] = ()) -> None:
        """Remove the records of lost work, see `cut_records`; later records follow what is left."""
        self._file.close()
        cut_records(self._path, step, again)
        self._file = self._path.open("a", encoding="utf-8")

    def holds(self, kind: str, step: int) -> bool:
        """Return whether the file has a record of this kind and step."""
        records = [_read_leniently(line) for line in self._path.read_bytes().splitlines()]
        return any((record[KIND], record.get(STEP)) == (kind, step) for record in records)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def without_lost_steps(records: Iterable[Record]) -> list[Record]:
    """Return the records as of a run that was never stopped, without those of work that was lost and done again."""
    listed = list(records)
    return [listed[number] for number in _kept(listed)]


def _kept(records: Sequence[Record]) -> list[int]:
    """Return the numbers, rising, of the records whose work was not lost; of those that are there twice, the last."""
    kept: dict[Any, int] = {}
    for number, record in enumerate(records):
        if record[KIND] == RESUME:
            kept = {key: earlier for key, earlier in kept.items() if records[earlier].get(STEP, 0) <= record[STEP]}
        # What follows the last step before a stop, such as its validation, may be done again too.
        once = STEP in record and record[KIND] != RESUME
        kept[(record[KIND], record[STEP]) if once else number] = number
    return sorted(kept.values())


def cut_records(path: Path, step: int, again: Collection[str] = ()) -> None:
    """Remove from a file what a run that continues after `step` will write again, and keep each other record once.

    `again` are the kinds of which `step` itself will have another record. A damaged line stays, for `read_metrics` to
    name. The file is replaced whole. Raises OSError if it cannot be written.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    records = [_read_leniently(line) for line in lines]
    kept = [number for number in _kept([*records, {KIND: RESUME, STEP: step}]) if number < len(lines)]
    kept = [number for number in kept if not (records[number][KIND] in again and records[number].get(STEP) == step)]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(lines[number] for number in kept))


def _read_leniently(line: bytes) -> Record:
    try:
        return _parse(Path(), 0, line)
    except MaloraError:
        return {KIND: ""}


def read_metrics(path: Path) -> list[Record]:
    """Return all records of a file, in order; a resumed run's hold lost steps too, see `without_lost_steps`.

    A last line that was only half written is left out, with a warning in the log. Raises MaloraError naming the line
    for damage anywhere else, and if the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MaloraError(f"{path} cannot be read: {error.strerror}") from error
    last = lines.pop()
    records = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    if last:
        try:
            records.append(_parse(path, len(lines) + 1, last))
        except MaloraError:
            logging.getLogger(__name__).warning("%s: the last line is half written and was left out", path)
    return records


def _parse(path: Path, number: int, line: bytes) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise MaloraError(f"{path}:{number}: damaged, not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get(KIND), str):
        raise MaloraError(f"{path}:{number}: damaged, not a record with {KIND!r}")
    if type(record.get(STEP, 0)) is not int or (record[KIND] == RESUME and STEP not in record):
        raise MaloraError(f"{path}:{number}: damaged, its {STEP!r} is no whole number")
    return {key: value if key in _TEXT_KEYS else _restore_non_finite(value) for key, value in record.items()}


def _spell_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _spell_non_finite(item) for key, item in value.items()}
    return [_spell_non_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _restore_non_finite(value: Any) -> Any:
    if isinstance(value, str) and value in _NON_FINITE:
        return float(value)
    if isinstance(value, dict):
        return {key: _restore_non_finite(item) for key, item in value.items()}
    return [_restore_non_finite(item) for item in value] if isinstance(value, list) else value


def _cut_half_line(path: Path) -> None:
    """Drop what a crashed writer left after the last newline: the next record would be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
