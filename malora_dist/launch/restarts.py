"""Whether a job may start a run again: it counts the starts that brought no newer checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from malora_dist.atomic import write_json
from malora_dist.errors import CheckpointError, ConfigError, TrainingError
from malora_dist.outcome import (
    EXIT_FAILED,
    EXIT_MISTAKE,
    EXIT_OK,
    EXIT_PREEMPTED,
    FINISHED,
    PREEMPTED,
    clear_outcome,
    read_outcome,
)

RESTARTS_FILE = "restarts.json"


@dataclass(frozen=True)
class Restarts:
    """A job's starts of a run: how many, the newest checkpoint's step at the last of them, and how many before it, in
    a row, had brought no newer one."""

    job: str
    starts: int
    without_progress: int
    step: int


@dataclass(frozen=True)
class Verdict:
    """What follows from the end of a start: the job's exit code, 75 for once more, and why."""

    code: int
    why: str


def begin(run: Path, job: str, max_restarts: int) -> Restarts:
    """Note in the run's folder that `job` starts it, once more or for the first time.

    Raises TrainingError if the job has ended more than `max_restarts` times in a row without a newer checkpoint,
    CheckpointError if exit.json or restarts.json is damaged, ConfigError if they cannot be written.
    """
    before = read_restarts(run)
    step = newest_step(run)
    if before is None or before.job != job:
        # Somebody has submitted it: whatever was wrong may have been mended.
        now = Restarts(job, 1, 0, step)
    else:
        now = Restarts(job, before.starts + 1, _vain_starts(run, before, step), step)
    if now.without_progress > max_restarts:
        raise TrainingError(_in_vain(run, now.without_progress, max_restarts))
    outcome = read_outcome(run)
    try:
        if outcome is not None and outcome["outcome"] != FINISHED:
            # Left there, it would speak for a start that ends before it has read the recipe.
            clear_outcome(run)
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RESTARTS_FILE, asdict(now))
    except OSError as error:
        raise ConfigError(f"output_dir={run} cannot be written: {error.strerror}") from error
    return now


def end(run: Path, max_restarts: int, *, stop_after_steps: int | None, exit_code: int | None = None) -> Verdict:
    """What the job does after a start that has ended, by exit.json and the checkpoints; see docs/checkpoints.md.

    `exit_code` is what its processes have left, if one has met a mistake before the run had a folder.

    Raises CheckpointError if exit.json or restarts.json is damaged.
    """
    outcome = read_outcome(run)
    if outcome is not None and outcome["outcome"] == FINISHED:
        return Verdict(EXIT_OK, f"{run} is finished")
    if EXIT_MISTAKE in (exit_code, outcome and outcome.get("exit_code")):
        return Verdict(EXIT_MISTAKE, "a mistake, which another start would not mend")
    why = "it was killed" if outcome is None else str(outcome.get("reason"))
    step = newest_step(run)
    said = f"{run} is saved at step {step} ({why})"
    if outcome is None or outcome["outcome"] != PREEMPTED:
        said = f"{run} has failed, with a checkpoint of step {step} ({why})"
    elif stop_after_steps is not None and "stop_after_steps" in why:
        return Verdict(EXIT_OK, f"{said}: as far as train.stop_after_steps={stop_after_steps} goes")
    vain = _vain_starts(run, read_restarts(run) or Restarts("", 1, 0, 0), step)
    if vain > max_restarts:
        return Verdict(EXIT_FAILED, f"{said}. {_in_vain(run, vain, max_restarts)}")
    return Verdict(EXIT_PREEMPTED, f"{said}: once more, from there")


def read_restarts(run: Path) -> Restarts | None:
    """The content of restarts.json, None without one. Raises CheckpointError if it is damaged."""
    path = run / RESTARTS_FILE
    if not path.exists():
        return None
    try:
        return Restarts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; remove it to start counting again") from error


def newest_step(run: Path) -> int:
    """The step of the newest finished checkpoint, 0 without one."""
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()), default=0)


def job_name(environment: Mapping[str, str]) -> str:
    """What names this job over all its starts. Raises ConfigError outside of one."""
    if "SLURM_JOB_ID" not in environment:
        raise ConfigError("SLURM_JOB_ID is not set: this is for job scripts; use malora train")
    return environment["SLURM_JOB_ID"]


def _vain_starts(run: Path, before: Restarts, step: int) -> int:
    """Starts in a row without a newer checkpoint, `before` included.

    One that SIGTERM ended does not count, for others wanted the nodes; one that its own time limit ended does, since
    the next has no more time.
    """
    outcome = read_outcome(run)
    if step > before.step:
        return 0
    others = outcome is not None and outcome["outcome"] == PREEMPTED and outcome.get("reason") == "SIGTERM"
    return before.without_progress + (0 if others else 1)


def _in_vain(run: Path, starts: int, max_restarts: int) -> str:
    return (
        f"{run} has ended {starts} times in a row without a newer checkpoint than step {newest_step(run)}, and "
        f"launch.max_restarts={max_restarts}: it is not started again"
    )
