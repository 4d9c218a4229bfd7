"""The folder of a run: claimed once, never overwritten, every file whole or absent."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout
from safetensors import SafetensorError

from malora_dist.errors import CheckpointError, ConfigError, TrainingError
from malora_dist.files import run_files
from malora_dist.files.json_text import parse_json
from malora_dist.files.locks import lock_at, marker
from malora_dist.launch.schedulers import is_requeued

LOCK = ".lock"
LOCK_SECONDS, LOCK_SHARE = 30, 0.8


def claim_run_folder(output_dir: str | Path) -> tuple[Path, BaseFileLock]:
    """Make `output_dir` the folder of a new run, or `output_dir-2`, `-3`, ... if it is taken.

    A folder that holds no file of a run is used as it is: with a job's log file, or empty because an earlier run was
    killed at once.

    Returns:
        The folder and its lock, which is held.

    Raises:
        ConfigError: it cannot be written.
    """
    wanted = Path(output_dir)
    if wanted.name in ("", ".."):
        raise ConfigError(f"output_dir={output_dir} must end in the name of the run's folder")
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"output_dir={output_dir} cannot be created: {error.strerror}") from error
        lock = None if _is_taken(folder) else _lock(folder, seconds=0)
        if lock is not None and not _is_taken(folder):
            return folder, lock
        if lock is not None:
            lock.release()
    raise AssertionError("count() ended")


def _is_taken(folder: Path) -> bool:
    try:
        return bool({path.name for path in folder.iterdir()} & run_files.OF_A_RUN)
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be read: {error.strerror}") from error


def lock_run_folder(folder: Path, seconds: float = LOCK_SECONDS) -> BaseFileLock:
    """Lock the folder against a second run in it, until the lock is released or this process ends.

    Raises:
        TrainingError: another process holds it for `seconds` more. One that was killed may take a while to end, and
            one that has lost its peers ends when it gives up waiting for them.
    """
    lock = _lock(folder, seconds)
    if lock is None:
        left = marker(folder / LOCK)
        or_killed = f"; if one of another host was killed, remove {left}" if left.exists() else ""
        raise TrainingError(f"output_dir={folder}: another process is training in it{or_killed}")
    return lock


def lock_seconds(environment: Mapping[str, str], timeout_seconds: float) -> float:
    """Return how long a start waits for the lock, while its other processes wait in a collective.

    In a job that was requeued this is long enough for the main process of the start before, which waits for the peers
    of a lost node for `timeout_seconds` in all.
    """
    return LOCK_SHARE * timeout_seconds if is_requeued(environment) else min(LOCK_SECONDS, LOCK_SHARE * timeout_seconds)


def _lock(folder: Path, seconds: float) -> BaseFileLock | None:
    try:
        lock = lock_at(folder / LOCK)
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {folder / LOCK} cannot be locked: {error}") from error
    return lock


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn what a file's writer raises where the system refuses into a TrainingError that names the run's folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder} cannot be written: {error}") from error


def read_evaluations(folder: Path) -> dict[str, Any]:
    """Read eval.json of a run that is continued; {} without one. Raises CheckpointError if it is damaged."""
    path = folder / run_files.EVALUATIONS
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no evaluations by name")
    return found


def read_measured_on(path: Path) -> Any:
    """Read what the evaluations in a run's folder were measured on; None if that was never written.

    Raises CheckpointError if it is damaged, since it then cannot show whether the evaluations are of this recipe.
    """
    return read_json(path) if path.exists() else None


def forget_evaluations(folder: Path) -> None:
    """Remove what earlier starts of a run without a checkpoint have measured. Raises OSError."""
    for name in (run_files.EVALUATIONS, run_files.BASELINE, *run_files.SCORES):
        (folder / name).unlink(missing_ok=True)


def scores_file(side: str, evaluation: Path = Path("eval.json")) -> str:  # noqa: B008  # frozen
    """Return the name of the file with the scores of every question of one side of `evaluation`.

    scores-tuned.jsonl beside eval.json, scores-tuned-2.jsonl beside eval-2.json, scores-tuned-x.jsonl beside x.json.
    """
    stem = evaluation.stem
    return f"scores-{side}{stem.removeprefix('eval') if stem.startswith('eval') else f'-{stem}'}.jsonl"


def scores_text(questions: Sequence[Mapping[str, object]]) -> str:
    """Return the content of such a file: a record a line (`evaluation.scoring.score_rows`)."""
    return "".join(f"{json.dumps(record)}\n" for record in questions)


def evaluation_file(folder: Path, result: dict[str, Any]) -> Path:
    """Return the file for `result`: eval.json, or eval-2.json, -3, ... if that holds what `result` does not.

    So the same measurement rewrites its file, an interrupted one is completed, and one with other tasks, rows or
    numbers (beyond rounding) gets a file of its own. A file that cannot be read is left as it is.
    """
    for number in count(1):
        path = folder / (run_files.EVALUATIONS if number == 1 else f"eval-{number}.json")
        if not path.exists() or _completes(result, path):
            return path
    raise AssertionError("count() ended")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run's folder. Raises CheckpointError if it cannot be read, or is damaged."""
    try:
        return parse_json(path.read_bytes(), non_finite=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Remove it, and this run measures again what it cannot know without it"
        ) from error


def _completes(result: dict[str, Any], path: Path) -> bool:
    try:
        return _says_all_of(result, read_json(path))
    except CheckpointError:
        return False


def _says_all_of(new: Any, old: Any) -> bool:
    if isinstance(new, dict) and isinstance(old, dict):
        return all(key in new and _says_all_of(new[key], value) for key, value in old.items())
    if isinstance(new, float) and isinstance(old, float):
        return math.isclose(new, old, rel_tol=1e-5, abs_tol=1e-9)
    return bool(new == old)
