"""jobs.jsonl: which jobs were submitted for a run, in the folder of the scheduler's name beside scripts and logs."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from malora_dist.files.json_text import parse_json
from malora_dist.launch.scheduler import JobState
from malora_dist.launch.schedulers import queues

JOBS_FILE = "jobs.jsonl"
TRAIN = "train"
SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class SubmittedJob:
    """A submission. `job` is the scheduler's id, `123_4` for a task of an array; `time` is ISO 8601.

    For a whole array, `array` holds the numbers of its tasks, `log` holds `%a` for a task's number, and each task's run
    is the folder `seed-<number>` of the run's folder. `after` is the job it waits for. `scheduler` is not written: it
    is the name of the folder.
    """

    job: str
    stage: str
    time: str
    log: str
    script: str
    after: str | None = None
    array: str | None = None
    scheduler: str = "slurm"

    def as_record(self) -> dict[str, str | None]:
        """Return what jobs.jsonl holds of it."""
        return {name: value for name, value in asdict(self).items() if name != "scheduler"}


def append_job(folder: Path, job: SubmittedJob) -> None:
    """Add a submission to jobs.jsonl of `folder`, the scheduler's folder of a run. Raises OSError."""
    line = json.dumps(job.as_record()) + "\n"
    with (folder / JOBS_FILE).open("a+b") as file:
        if file.tell() and _last_byte(folder / JOBS_FILE) != b"\n":
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jobs(folder: Path) -> list[SubmittedJob]:
    """Return the submissions in jobs.jsonl of a scheduler's folder of a run, in order; none without the file.

    Lines that are damaged or half written are left out, with a warning in the log.
    """
    path = folder / JOBS_FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        logging.getLogger(__name__).warning("%s cannot be read: %s", path, error.strerror)
        return []
    return [job for number, line in enumerate(lines, start=1) if (job := _parse(path, number, line)) is not None]


def jobs_of(run: Path) -> list[SubmittedJob]:
    """Return the jobs that work in this run's folder, as submitted; a task of an array is a job of its own."""
    seed = SEED.fullmatch(run.name)
    above = [] if seed is None else _all_jobs(run.parent)
    tasks = [_task(job, int(seed[1])) for job in above if seed and job.array and int(seed[1]) in array_tasks(job.array)]
    return [*tasks, *(job for job in _all_jobs(run) if job.array is None)]


def runs_of(folder: Path) -> list[Path]:
    """Return the run folders of what was submitted for `folder`: those of its arrays' tasks, and itself."""
    jobs = _all_jobs(folder)
    numbers = sorted({number for job in jobs if job.array for number in array_tasks(job.array)})
    own = [folder] if not jobs or any(job.array is None for job in jobs) else []
    return [*own, *(folder / f"seed-{number}" for number in numbers)]


def has_jobs(folder: Path) -> bool:
    """Return whether jobs were submitted for this folder."""
    return any((folder / name / JOBS_FILE).is_file() for name in queues())


def job_states(jobs: Iterable[SubmittedJob]) -> dict[str, JobState]:
    """Return the states of jobs by their ids; each scheduler is asked once. Never raises."""
    found: dict[str, JobState] = {}
    listed = list(jobs)
    for name, queue in queues().items():
        found |= queue.states([job.job for job in listed if job.scheduler == name])
    return found


def _all_jobs(folder: Path) -> list[SubmittedJob]:
    return [job for name in queues() for job in read_jobs(folder / name)]


def array_tasks(text: str) -> list[int]:
    """Return the numbers in `1-3,7` or `0-9:3%2`, the tasks of an array."""
    return list(_numbers(text.partition("%")[0]))


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if match is not None:
            first, last, step = (int(number) if number else None for number in match.groups())
            yield from range(first or 0, (first or 0 if last is None else last) + 1, step or 1)


def _task(job: SubmittedJob, number: int) -> SubmittedJob:
    return replace(job, job=f"{job.job}_{number}", log=job.log.replace("%a", str(number)), array=None)


def _parse(path: Path, number: int, line: bytes) -> SubmittedJob | None:
    if not line.strip():
        return None
    try:
        found = parse_json(line)
        names = [field.name for field in fields(SubmittedJob) if field.name != "scheduler"]
        return SubmittedJob(**{name: found[name] for name in names}, scheduler=path.parent.name)
    except (ValueError, TypeError, KeyError) as error:
        logging.getLogger(__name__).warning("%s:%d: damaged, and left out: %r", path, number, error)
        return None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
