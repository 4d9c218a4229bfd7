"""The status of a run, read from the files of its folder alone."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from malora_dist.checkpoint.layout import BEST, MANIFEST, checkpoint_name, step_of
from malora_dist.errors import MaloraError
from malora_dist.files import run_files
from malora_dist.files.exit_status import FAILED, FINISHED, read_exit_status
from malora_dist.launch.log_errors import last_error
from malora_dist.launch.restarts import newest_step, read_restarts
from malora_dist.tracking.metrics import (
    KIND,
    MAX_STEPS,
    RESUME,
    RUN,
    STEP,
    STEP_SECONDS,
    TRAIN,
    Record,
    read_metrics,
    without_lost_steps,
)

WAITING, RUNNING = "waiting to start", "running"
# The time left is estimated from the median of this many records.
RECENT = 20
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """`state`: waiting to start, running (or killed: the folder does not tell), finished, preempted or failed.

    starts counts all jobs' starts. step: completed and not lost. eta_seconds: of the steps left, at the pace of the
    last records. age_seconds: since the last record. newest, best: names of checkpoints. damaged: what could not be
    read. None is not known, or does not apply.
    """

    state: str
    starts: int
    step: int
    total: int | None
    eta_seconds: float | None
    age_seconds: float | None
    newest: str | None
    best: str | None
    error: str | None
    damaged: tuple[str, ...]

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return max(0, self.starts - 1)


def read_run_status(folder: Path, log: Path | None = None) -> RunStatus:
    """Return the status of a run. Its folder may be missing, incomplete or damaged; nothing is raised.

    Args:
        folder: The run's.
        log: Where its processes write what goes wrong: a job's log. Default: train.log.
    """
    damaged: list[str] = []
    outcome = _try(lambda: read_exit_status(folder), damaged)
    restarts = _try(lambda: read_restarts(folder), damaged)
    records, done = _records(folder / run_files.METRICS, damaged)
    newest = newest_step(folder)
    steps = [record for record in done if record[KIND] == TRAIN]
    step = max([newest, *(_count(record, STEP) for record in steps), _count(outcome or {}, STEP)])
    total = next((_count(record, MAX_STEPS) or None for record in reversed(records) if record[KIND] == RUN), None)
    begun = (folder / run_files.CONFIG).exists()
    state = str(outcome["outcome"]) if outcome else RUNNING if begun else WAITING
    resumed = sum(record[KIND] == RESUME for record in records)
    return RunStatus(
        state=state,
        starts=max(resumed + 1 if begun else 0, sum(own.starts for own in (restarts or {}).values())),
        step=step,
        total=total,
        eta_seconds=None if state == FINISHED else _time_left(steps, step, total),
        age_seconds=_age(folder / run_files.METRICS) if records else None,
        newest=checkpoint_name(newest) if newest else None,
        best=_best(folder / run_files.CHECKPOINTS),
        error=None if state == FINISHED else _error(folder, outcome, log),
        damaged=tuple(damaged),
    )


def _try(read: Callable[[], T], damaged: list[str]) -> T | None:
    try:
        return read()
    except (MaloraError, OSError) as error:
        damaged.append(str(error))
        return None


def _records(path: Path, damaged: list[str]) -> tuple[list[Record], list[Record]]:
    """Return all records, and those without lost steps; an incomplete last line is still being written."""
    records = (_try(lambda: read_metrics(path), damaged) or []) if path.exists() else []
    try:
        return records, without_lost_steps(records)
    except (KeyError, TypeError) as error:
        damaged.append(f"{path} is damaged: {error!r}")
        return [], []


def _count(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    return value if isinstance(value, int) else 0


def _time_left(steps: list[Record], step: int, total: int | None) -> float | None:
    found = [record.get(STEP_SECONDS) for record in steps[-RECENT:]]
    seconds = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
    if total is None or not seconds:
        return None
    return max(0, total - step) * float(statistics.median(seconds))


def _age(path: Path) -> float | None:
    try:
        # A file server's clock may be ahead.
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _best(checkpoints: Path) -> str | None:
    try:
        name = (checkpoints / BEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return name if step_of(name) is not None and (checkpoints / name / MANIFEST).is_file() else None


def _error(folder: Path, outcome: dict[str, Any] | None, log: Path | None) -> str | None:
    if outcome is not None and outcome["outcome"] == FAILED and outcome.get("reason"):
        return str(outcome["reason"]).splitlines()[0]
    return (last_error(log) if log else None) or last_error(folder / run_files.LOG)
