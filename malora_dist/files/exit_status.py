"""How a run ended: exit codes, and exit.json for wrappers whose launcher does not hand codes on."""

import time
from pathlib import Path
from typing import Any

from malora_dist.errors import CheckpointError
from malora_dist.files import run_files
from malora_dist.files.atomic import write_json
from malora_dist.files.json_text import parse_json

FINISHED, PREEMPTED, FAILED = "finished", "preempted", "failed"
# 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again.
EXIT_OK, EXIT_FAILED, EXIT_MISTAKE, EXIT_PREEMPTED = 0, 1, 2, 75


def write_exit_status(folder: Path, outcome: str, code: int, *, reason: str, step: int, checkpoint: str | None) -> None:
    """Write exit.json: outcome, the processes' exit code, reason, last step, and the checkpoint to resume from.

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
        write_json(folder / run_files.EXIT, content)
    except OSError as error:
        raise CheckpointError(f"{folder / run_files.EXIT} cannot be written: {error.strerror}") from error


def read_exit_status(folder: Path) -> dict[str, Any] | None:
    """Return the content of exit.json; None without one, as the run is still in progress or was killed.

    Raises CheckpointError if it is damaged.
    """
    path = folder / run_files.EXIT
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
    """Remove exit.json of the start before this one. Raises CheckpointError if it cannot be removed."""
    try:
        (folder / run_files.EXIT).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder / run_files.EXIT} cannot be removed: {error.strerror}") from error
