"""What the files of a run folder must hold for the report to show them; anything else is damage, told with its key."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from malora_dist.errors import MaloraError, brief, short
from malora_dist.tracking.metrics import (
    BASE_DTYPE,
    BASE_PARAMETERS,
    DEVICE,
    EVAL,
    KIND,
    LOSS,
    MAX_STEPS,
    ROUTING,
    RUN,
    SHARE,
    STEP,
    TASKS,
    TRAIN,
    TRAINABLE_PARAMETERS,
    WORLD_SIZE,
    Record,
)

SHARES = ("accuracy", "stderr", "accuracy_norm", "majority")
# Beyond it no picture can be drawn.
LARGEST = 1e30


def check_evaluations(path: Path, content: Mapping[str, Any]) -> None:
    """Raise MaloraError unless eval.json holds sides of tasks with scores."""
    for side, measured in content.items():
        tasks = _mapping(path, f"{side}.tasks", _mapping(path, side, measured).get("tasks"))
        for task, row in tasks.items():
            where = f"{side}.tasks.{task}"
            if not is_count(_mapping(path, where, row).get("n")):
                _refuse(path, f"{where}.n", row.get("n"), "a whole number")
            if row.get(LOSS) is not None:
                # One that is not finite is a result too.
                _number(path, f"{where}.{LOSS}", row[LOSS], finite=False)
            for name in SHARES:
                # Only an error is always there, of 0 if nothing is said.
                value = row.get(name, 0.0 if name == "stderr" else None)
                if not _is_share(value) and (value is not None or name == "stderr"):
                    _refuse(path, f"{where}.{name}", value, "a number from 0 to 1")


def check_counts(path: Path, content: Mapping[str, Any]) -> None:
    """Raise MaloraError unless data.json holds names and values for each task."""
    for task, row in content.items():
        _mapping(path, task, row)


def check_adapter(path: Path, content: Mapping[str, Any]) -> None:
    """Raise MaloraError unless the block `malora` of adapter_config.json holds names and values."""
    if content.get("malora") is not None:
        _mapping(path, "malora", content["malora"])


def check_config(path: Path, content: Mapping[str, Any]) -> None:
    """Raise MaloraError unless the sections of config.yaml hold names and values, and its tasks have names."""
    for section in ("model", "adapter", "data", "parallel", "train"):
        if content.get(section) is not None:
            _mapping(path, section, content[section])
    tasks = (content.get("data") or {}).get("tasks") or []
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        _refuse(path, "data.tasks", tasks, "a list of tasks")


def check_record(path: Path, record: Record) -> None:
    """Raise MaloraError for a record of metrics.jsonl whose numbers are none."""
    kind = record[KIND]
    where = f"the record {kind} {record.get(STEP, '')}".rstrip()
    if kind in (TRAIN, EVAL, ROUTING) and STEP not in record:
        _refuse(path, f"{where}: {STEP}", None, "a whole number")
    if kind in (TRAIN, EVAL):
        for name, value in record.items():
            if name != KIND and (isinstance(value, bool) or not isinstance(value, int | float) or _too_large(value)):
                _refuse(path, f"{where}: {name}", value, "a number")
    if kind == RUN:
        for name in (WORLD_SIZE, MAX_STEPS, TRAINABLE_PARAMETERS, BASE_PARAMETERS):
            if name in record and not is_count(record[name]):
                _refuse(path, f"{where}: {name}", record[name], "a whole number of at least 0")
        for name in (DEVICE, BASE_DTYPE):
            if not isinstance(record.get(name, ""), str):
                _refuse(path, f"{where}: {name}", record[name], "text")
    if kind == ROUTING:
        _check_routing(path, where, record)


def _check_routing(path: Path, where: str, record: Record) -> None:
    """Check that all tasks have the same layers, and all layers the same number of shares."""
    tasks, share = record.get(TASKS), _mapping(path, f"{where}: {SHARE}", record.get(SHARE))
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks) or set(tasks) != set(share):
        _refuse(path, f"{where}: {TASKS}", tasks, f"the tasks of {SHARE}")
    layers = [_mapping(path, f"{where}: {SHARE}.{task}", share[task]) for task in share]
    if any(own.keys() != layers[0].keys() for own in layers):
        _refuse(path, f"{where}: {SHARE}", share, "the same layers for each task")
    rows = [row for own in layers for row in own.values()]
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows[0]) or not row:
            _refuse(path, f"{where}: {SHARE}", row, "as many shares as the model has experts")
        _numbers(path, f"{where}: {SHARE}", row)


def _numbers(path: Path, where: str, values: Sequence[Any]) -> None:
    for value in values:
        _number(path, where, value)


def _number(path: Path, where: str, value: Any, *, finite: bool = True) -> None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or _too_large(value) or (finite and not math.isfinite(value)):
        _refuse(path, where, value, "a number")


def is_count(value: Any) -> bool:
    """Return whether this is a whole number that a page can show."""
    return type(value) is int and 0 <= value < LARGEST


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _too_large(value: float) -> bool:
    # A comparison, since a whole number of Python may be too large for a float.
    return not -LARGEST < value < LARGEST and (isinstance(value, int) or math.isfinite(value))


def _mapping(path: Path, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, where, value, "names and values")
    result: Mapping[str, Any] = value
    return result


def _refuse(path: Path, where: str, value: Any, rule: str) -> None:
    raise MaloraError(f"{path} is damaged: {brief(where)}={short(value)} must be {rule}")


def clean(value: Any) -> Any:
    """Return the value with U+FFFD for each character in its texts that a page or a picture cannot hold."""
    if isinstance(value, str):
        return "".join(letter if _can_be_shown(letter) else "\ufffd" for letter in value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def _can_be_shown(letter: str) -> bool:
    code = ord(letter)
    return letter in "\t\n" or (
        code >= 32 and not 0x7F <= code <= 0x9F and not 0xD800 <= code <= 0xDFFF and code & 0xFFFE != 0xFFFE
    )
