"""Whether a job starts its run again: it counts the starts that brought no newer checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.atomic import write_json
from malora_dist.files.exit_status import (
    EXIT_FAILED,
    EXIT_MISTAKE,
    EXIT_OK,
    EXIT_PREEMPTED,
    FINISHED,
    PREEMPTED,
    RUN_FILES,
    clear_outcome,
    read_outcome,
)
from malora_dist.files.json_text import parse_json

RESTARTS_FILE = "restarts.json"


@dataclass(frozen=True)
class Restarts:
    """A job's starts of a run: how many, the newest checkpoint's step at the last of them, and how many in a row have
    ended by themselves without a newer one."""

    starts: int = 0
    in_vain: int = 0
    step: int = 0


@dataclass(frozen=True)
class Verdict:
    """What follows from the end of a start: the job's exit code, 75 for once more, and why."""

    code: int
    why: str


def begin(run: Path, job: str) -> Restarts:
    """Note in the run's folder that `job` starts it, once more or for the first time.

    Raises CheckpointError if exit.json or restarts.json is damaged, ConfigError if the folder holds something that no
    run goes on with, or cannot be written.
    """
    jobs = read_restarts(run)
    before, step = jobs.get(job, Restarts()), newest_step(run)
    now = Restarts(before.starts + 1, before.in_vain if step == before.step else 0, step)
    outcome = read_outcome(run)
    try:
        if outcome is not None and outcome["outcome"] != FINISHED:
            # Left there, it would speak for a start that ends before it has read the recipe.
            clear_outcome(run)
        run.mkdir(parents=True, exist_ok=True)
        check_folder(run)
        _write(run, {**jobs, job: now})
    except OSError as error:
        raise ConfigError(f"output_dir={run} cannot be written: {error.strerror}") from error
    return now


def end(run: Path, job: str, max_restarts: int, *, stop_after_steps: int | None, exit_code: int | None) -> Verdict:
    """What the job does after a start whose processes are gone, by exit.json and the checkpoints.

    `exit_code` is what they have left, if one has met a mistake before the run had a folder. A start that the scheduler
    ends together with the job's script, for a lost node or another job, does not come here and is not counted; nor is
    one that SIGTERM ended. One that its time limit ended is: the next has no more time.

    Raises CheckpointError if exit.json or restarts.json is damaged, OSError if that cannot be written.
    """
    outcome = read_outcome(run) or {"outcome": "killed", "reason": "killed, without a word"}
    why, step = str(outcome.get("reason")), newest_step(run)
    if outcome["outcome"] == FINISHED:
        return Verdict(EXIT_OK, f"{run} is finished")
    if EXIT_MISTAKE in (exit_code, outcome.get("exit_code")):
        return Verdict(EXIT_MISTAKE, "a mistake, which another start would not mend")
    said = f"{run} has failed, with a checkpoint of step {step} ({why})"
    if outcome["outcome"] == PREEMPTED:
        said = f"{run} is saved at step {step} ({why})"
        if stop_after_steps is not None and "stop_after_steps" in why:
            return Verdict(EXIT_OK, f"{said}: as far as train.stop_after_steps={stop_after_steps} goes")
    vain = _count(run, job, step, for_others=outcome["outcome"] == PREEMPTED and why == "SIGTERM")
    if vain > max_restarts:
        return Verdict(
            EXIT_FAILED,
            f"{said}. It has ended {vain} times in a row without a newer checkpoint than step {step}, and "
            f"launch.max_restarts={max_restarts}: it is not started again",
        )
    return Verdict(EXIT_PREEMPTED, f"{said}: once more, from there")


def read_restarts(run: Path) -> dict[str, Restarts]:
    """restarts.json by job, by their first starts; empty without one. Raises CheckpointError if it is damaged."""
    path = run / RESTARTS_FILE
    if not path.exists():
        return {}
    try:
        jobs = parse_json(path.read_bytes())
        return {job: Restarts(**{key: int(value) for key, value in own.items()}) for job, own in jobs.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; remove it to start counting again") from error


def check_folder(run: Path) -> None:
    """Raise ConfigError if the folder holds files of a run that cannot go on: each start would train beside it."""
    if run.is_dir() and not (run / "config.yaml").exists():
        found = sorted({path.name for path in run.iterdir()} & RUN_FILES)
        if found:
            raise ConfigError(
                f"output_dir={run} holds {', '.join(found)} and no config.yaml: no run can go on there; move it away"
            )


def newest_step(run: Path) -> int:
    """The step of the newest finished checkpoint, 0 without one."""
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()), default=0)


def _count(run: Path, job: str, step: int, *, for_others: bool) -> int:
    """Starts in a row that have ended in vain, this one included; noted."""
    jobs = read_restarts(run)
    before = jobs.get(job, Restarts(starts=1))
    vain = 0 if step > before.step else before.in_vain + (0 if for_others else 1)
    _write(run, {**jobs, job: replace(before, in_vain=vain)})
    return vain


def _write(run: Path, jobs: dict[str, Restarts]) -> None:
    write_json(run / RESTARTS_FILE, {job: asdict(own) for job, own in jobs.items()})
