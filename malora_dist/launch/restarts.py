"""Whether a job starts its run again: starts in a row without a newer checkpoint are counted and limited."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malora_dist.checkpoint.layout import MANIFEST, step_of
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files import run_files
from malora_dist.files.atomic import write_json
from malora_dist.files.exit_status import (
    EXIT_FAILED,
    EXIT_MISTAKE,
    EXIT_OK,
    EXIT_PREEMPTED,
    FINISHED,
    PREEMPTED,
    clear_exit_status,
    read_exit_status,
)
from malora_dist.files.json_text import parse_json

RESTARTS_FILE = "restarts.json"
# Key of the number of starts without progress in that file.
IN_FILE = "in_vain"


@dataclass(frozen=True)
class Restarts:
    """A job's starts of a run: how many, the newest checkpoint's step at the last of them, and how many in a row have
    ended by themselves without a newer one."""

    starts: int = 0
    without_progress: int = 0
    step: int = 0


@dataclass(frozen=True)
class RestartDecision:
    """What a job does after a start: its exit code, 75 to be started again, and why."""

    code: int
    why: str


def begin(run: Path, job: str) -> Restarts:
    """Note in the run's folder that `job` starts it, once more or for the first time.

    Raises CheckpointError if exit.json or restarts.json is damaged, ConfigError if the folder holds something that no
    run can resume from, or cannot be written.
    """
    jobs = read_restarts(run)
    before, step = jobs.get(job, Restarts()), newest_step(run)
    now = Restarts(before.starts + 1, before.without_progress if step == before.step else 0, step)
    outcome = read_exit_status(run)
    try:
        if outcome is not None and outcome["outcome"] != FINISHED:
            # Otherwise it would be taken for the exit status of this start, if that ends before it reads the recipe.
            clear_exit_status(run)
        run.mkdir(parents=True, exist_ok=True)
        check_folder(run)
        _write(run, {**jobs, job: now})
    except OSError as error:
        raise ConfigError(f"output_dir={run} cannot be written: {error.strerror}") from error
    return now


def end(
    run: Path, job: str, max_restarts: int, *, stop_after_steps: int | None, exit_code: int | None
) -> RestartDecision:
    """Return what the job does after a start whose processes have ended, by exit.json and the checkpoints.

    A start that the scheduler ends together with the job's script, for a lost node or another job, does not call
    this and is not counted; nor is one that SIGTERM ended. One that its time limit ended is counted: the next has no
    more time.

    Args:
        run: The run's folder.
        job: The job's id.
        max_restarts: How many starts in a row may end without a newer checkpoint.
        stop_after_steps: The recipe's train.stop_after_steps.
        exit_code: What the processes have left, if one has met a mistake before the run had a folder.

    Raises:
        CheckpointError: If exit.json or restarts.json is damaged.
        OSError: If restarts.json cannot be written.
    """
    outcome = read_exit_status(run) or {"outcome": "killed", "reason": "killed without an error message"}
    why, step = str(outcome.get("reason")), newest_step(run)
    if outcome["outcome"] == FINISHED:
        return RestartDecision(EXIT_OK, f"{run} is finished")
    if EXIT_MISTAKE in (exit_code, outcome.get("exit_code")):
        return RestartDecision(EXIT_MISTAKE, "an error in the recipe or the data; restarting would not help")
    summary = f"{run} has failed, with a checkpoint of step {step} ({why})"
    if outcome["outcome"] == PREEMPTED:
        summary = f"{run} was saved at step {step} ({why})"
        if stop_after_steps is not None and "stop_after_steps" in why:
            return RestartDecision(EXIT_OK, f"{summary}: train.stop_after_steps={stop_after_steps} is reached")
    count = _count(run, job, step, for_others=outcome["outcome"] == PREEMPTED and why == "SIGTERM")
    if count > max_restarts:
        return RestartDecision(
            EXIT_FAILED,
            f"{summary}. It has ended {count} times in a row without a newer checkpoint than step {step}, and "
            f"launch.max_restarts={max_restarts}: it is not started again",
        )
    return RestartDecision(EXIT_PREEMPTED, f"{summary}: restarting from there")


def read_restarts(run: Path) -> dict[str, Restarts]:
    """Return restarts.json by job, in order of first starts; {} without one. Raises CheckpointError for damage."""
    path = run / RESTARTS_FILE
    if not path.exists():
        return {}
    try:
        jobs = parse_json(path.read_bytes())
        return {job: _restarts(own) for job, own in jobs.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; remove it to start counting again") from error


def check_folder(run: Path) -> None:
    """Raise ConfigError if the folder holds files of a run that cannot be resumed: each start would train beside it."""
    if run.is_dir() and not (run / run_files.CONFIG).exists():
        found = sorted({path.name for path in run.iterdir()} & run_files.OF_A_RUN)
        if found:
            raise ConfigError(
                f"output_dir={run} holds {', '.join(found)} and no config.yaml: no run can go on there; move it away"
            )


def newest_step(run: Path) -> int:
    """Return the step of the newest finished checkpoint, 0 without one."""
    found = (run / run_files.CHECKPOINTS).glob(f"*/{MANIFEST}")
    return max((step for path in found if (step := step_of(path.parent.name)) is not None), default=0)


def _count(run: Path, job: str, step: int, *, for_others: bool) -> int:
    """Count the starts in a row that have ended without progress, this one included, and write the count."""
    jobs = read_restarts(run)
    before = jobs.get(job, Restarts(starts=1))
    count = 0 if step > before.step else before.without_progress + (0 if for_others else 1)
    _write(run, {**jobs, job: replace(before, without_progress=count)})
    return count


def _write(run: Path, jobs: dict[str, Restarts]) -> None:
    write_json(run / RESTARTS_FILE, {job: _record(own) for job, own in jobs.items()})


def _record(own: Restarts) -> dict[str, int]:
    return {"starts": own.starts, IN_FILE: own.without_progress, "step": own.step}


def _restarts(record: Mapping[str, Any]) -> Restarts:
    numbers = {key: int(value) for key, value in record.items()}
    return Restarts(without_progress=numbers.pop(IN_FILE, 0), **numbers)
