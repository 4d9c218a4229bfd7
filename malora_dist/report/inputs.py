"""The files of a run folder as one value; what a run did not write is None or empty."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from malora_dist.config.yaml_reader import read_yaml_text
from malora_dist.errors import MaloraError
from malora_dist.files import run_files
from malora_dist.files.json_text import parse_json
from malora_dist.report.rules import (
    check_adapter,
    check_config,
    check_counts,
    check_evaluations,
    check_record,
    clean,
    is_count,
)
from malora_dist.tracking.metrics import (
    EVAL,
    KIND,
    ROUTING,
    RUN,
    STEP,
    TASKS,
    TRAIN,
    Record,
    read_metrics,
    without_lost_steps,
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run folder holds.

    evaluations is eval.json, counts data.json, run the facts of the last start, routing the last routing record,
    parameters the number of values in the adapter's weights, missing the names of files that are not there.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    run: Record = field(default_factory=dict)
    train: Sequence[Record] = ()
    validation: Sequence[Record] = ()
    routing: Record | None = None
    evaluations: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    missing: Sequence[str] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names in the recipe's order, then any others the files name: the order of every table and colour."""
        named = [str(task["name"]) for task in _get(self.config, "data", "tasks") or [] if "name" in task]
        for side in self.evaluations.values():
            named += side["tasks"]
        named += [*self.counts, *(self.routing or {}).get(TASKS, ())]
        for record in self.train:
            named += [key.split("/")[1] for key in record if key.startswith("train/")]
        return tuple(dict.fromkeys(named))

    def setting(self, section: str, key: str) -> Any:
        """Return a value of config.yaml, None if it is not there."""
        return _get(self.config, section, key)

    def series(self, name: str, kind: str = TRAIN) -> tuple[list[float], list[float]]:
        """Return the steps and finite values of a metric; records without it are left out."""
        records = self.train if kind == TRAIN else self.validation
        points = [(record[STEP], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def non_finite_steps(self) -> list[int]:
        """Steps of training records that hold a nan or an infinity."""
        return [
            record[STEP]
            for record in self.train
            if any(isinstance(value, float) and not math.isfinite(value) for value in record.values())
        ]


def read_run(run_dir: Path) -> RunFiles:
    """Read what is there. Raises MaloraError if `run_dir` is no folder, or naming the file that is damaged."""
    if not run_dir.is_dir():
        raise MaloraError(f"{run_dir} is not a folder")
    wanted = (
        run_files.CONFIG,
        run_files.METRICS,
        run_files.EVALUATIONS,
        run_files.DATA,
        f"{run_files.ADAPTER}/adapter_config.json",
    )
    missing = [name for name in wanted if not (run_dir / name).is_file()]
    records = [] if run_files.METRICS in missing else _records(run_dir / run_files.METRICS)
    routing = [record for record in records if record[KIND] == ROUTING and record.get(TASKS)]
    text = "" if run_files.CONFIG in missing else _text(run_dir / run_files.CONFIG)
    return RunFiles(
        name=clean(run_dir.resolve().name),
        config=_yaml(run_dir / run_files.CONFIG, text),
        config_text=text,
        # Of several starts the last: one before may have been of another recipe.
        run=next((record for record in reversed(records) if record[KIND] == RUN), {}),
        train=[record for record in records if record[KIND] == TRAIN],
        validation=[record for record in records if record[KIND] == EVAL],
        routing=routing[-1] if routing else None,
        evaluations=_json(run_dir / run_files.EVALUATIONS, check_evaluations),
        counts=_json(run_dir / run_files.DATA, check_counts),
        adapter=_json(run_dir / run_files.ADAPTER / "adapter_config.json", check_adapter),
        parameters=_count_parameters(run_dir / run_files.ADAPTER / "adapter_model.safetensors"),
        missing=missing,
    )


def _get(config: dict[str, Any], section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _records(path: Path) -> list[Record]:
    records: list[Record] = clean(without_lost_steps(read_metrics(path)))
    for record in records:
        check_record(path, record)
    return records


def _text(path: Path) -> str:
    try:
        text: str = clean(path.read_text(encoding="utf-8"))
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise MaloraError(f"{path} is damaged, or cannot be read: {error}") from error


def _yaml(path: Path, text: str) -> dict[str, Any]:
    """Parse a YAML text and check it as a recipe."""
    value = read_yaml_text(text, f"{path} is damaged")
    return _mapping(path, {} if value is None else value, check_config)


def _json(path: Path, check: Callable[[Path, Mapping[str, Any]], None]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _mapping(path, parse_json(path.read_bytes(), non_finite=True), check)
    except OSError as error:
        raise MaloraError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MaloraError(f"{path} is damaged, not JSON: {error}") from error


def _mapping(path: Path, value: Any, check: Callable[[Path, Mapping[str, Any]], None]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MaloraError(f"{path} is damaged: it must hold names and values, not a {type(value).__name__}")
    cleaned: dict[str, Any] = clean(value)
    check(path, cleaned)
    return cleaned


def _count_parameters(path: Path) -> int | None:
    """Count the values in a safetensors file, from its header alone: 8 bytes of length, then JSON."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise MaloraError(f"{path} is damaged: its header is longer than the file")
        try:
            header = parse_json(file.read(length))
            shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
            if not all(is_count(size) for shape in shapes for size in shape):
                raise ValueError("a shape holds what is no size")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MaloraError(f"{path} is damaged: its header is none of safetensors: {error!r}") from error
    count: int = sum(math.prod(shape) for shape in shapes)
    if not is_count(count):
        raise MaloraError(f"{path} is damaged: its header tells of more numbers than any disk holds")
    return count
