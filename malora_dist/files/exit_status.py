"""How a run ended: exit codes, and exit.json for wrappers whose launcher does not hand codes on."""

import time
from pathlib import Path
from typing import Any

from malora_dist.errors import CheckpointError
from malora_dist.files.atomic import write_json
from malora_dist.files.json_text import parse_json

EXIT_FILE = "exit.json"
# The recipe, base and rows that eval.json and baseline.json are of, until a checkpoint says so.
MEASURED_ON = "measured_on.json"
# A folder that holds one of these is the folder of a run.
RUN_FILES = {
    "adapter", "baseline.json", "checkpoints", "config.yaml", "data.json", "eval.json", EXIT_FILE, MEASURED_ON,
    "metrics.jsonl", "report", "scores-base.jsonl", "scores-tuned.jsonl", "train.log",
}  # fmt: skip
FINISHED, PREEMPTED, FAILED = "finished", "preempted", "failed"
# 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again.
EXIT_OK, EXIT_FAILED, EXIT_MISTAKE, EXIT_PREEMPTED = 0, 1, 2, 75


def write_exit_status(folder: Path, outcome: str, code: int, *, reason: str, step: int, checkpoint: str | None) -> None:
    """Write exit.json: outcome, the processes' exit code, why, the last step, the checkpoint to go on from.

    Raises CheckpointError if it cannot be written.
    """
    content = {
        "outcome": outcome,
        "exit_code": code,
        "reason": reason,
        "step": step,
        "checkpoint": checkpoint,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        write_json(folder / EXIT_FILE, content)
    except OSError as error:
        raise CheckpointError(f"{folder / EXIT_FILE} cannot be written: {error.strerror}") from error


def read_exit_status(folder: Path) -> dict[str, Any] | None:
    """Return the content of exit.json; None without one: the run is still going on, or was killed.

    Raises CheckpointError if it is damaged.
    """
    path = folder / EXIT_FILE
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes())
        content["outcome"], content["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    result: dict[str, Any] = content
    return result


def clear_exit_status(folder: Path) -> None:
    """Remove exit.json of the session before this one."""
    (folder / EXIT_FILE).unlink(missing_ok=True)
