"""jobs.jsonl: which jobs were submitted for a run."""

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from malora_dist.files.json_text import parse_json

JOBS_FILE = "jobs.jsonl"
# Of a run's folder: scripts, logs and jobs.jsonl.
SLURM_FOLDER = "slurm"
TRAIN = "train"
SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class Job:
    """A submission. `job` is Slurm's number, `123_4` for a task of an array; `time` is ISO 8601.

    For a whole array, `array` names its tasks as sbatch does, `log` holds `%a` for a task's number, and each task's run
    is the folder `seed-<number>` of the run's folder. `after` is the job it waits for.
    """

    job: str
    stage: str
    time: str
    log: str
    script: str
    after: str | None = None
    array: str | None = None


def append_job(folder: Path, job: Job) -> None:
    """Add a submission to jobs.jsonl of `folder`, the `slurm` folder of a run. Raises OSError."""
    line = json.dumps(asdict(job)) + "\n"
    with (folder / JOBS_FILE).open("a+b") as file:
        if file.tell() and _last_byte(folder / JOBS_FILE) != b"\n":
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jobs(folder: Path) -> list[Job]:
    """The submissions in jobs.jsonl of a run's `slurm` folder, in order; none without the file.

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


def jobs_of(run: Path) -> list[Job]:
    """The jobs that work in this run's folder, in the order of submission, tasks of arrays as jobs of their own."""
    seed = SEED.fullmatch(run.name)
    above = [] if seed is None else read_jobs(run.parent / SLURM_FOLDER)
    tasks = [_task(job, int(seed[1])) for job in above if seed and job.array and int(seed[1]) in array_tasks(job.array)]
    return [*tasks, *(job for job in read_jobs(run / SLURM_FOLDER) if job.array is None)]


def runs_of(folder: Path) -> list[Path]:
    """The run folders of what was submitted for `folder`: those of its arrays' tasks, and itself."""
    jobs = read_jobs(folder / SLURM_FOLDER)
    numbers = sorted({number for job in jobs if job.array for number in array_tasks(job.array)})
    own = [folder] if not jobs or any(job.array is None for job in jobs) else []
    return [*own, *(folder / f"seed-{number}" for number in numbers)]


def array_tasks(text: str) -> list[int]:
    """The numbers that sbatch reads in `1-3,7` or `0-9:3%2`, the tasks of an array."""
    return list(_numbers(text.partition("%")[0]))


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if match is not None:
            first, last, step = (int(number) if number else None for number in match.groups())
            yield from range(first or 0, (first or 0 if last is None else last) + 1, step or 1)


def _task(job: Job, number: int) -> Job:
    return replace(job, job=f"{job.job}_{number}", log=job.log.replace("%a", str(number)), array=None)


def _parse(path: Path, number: int, line: bytes) -> Job | None:
    if not line.strip():
        return None
    try:
        found = parse_json(line)
        return Job(**{field.name: found[field.name] for field in fields(Job)})
    except (ValueError, TypeError, KeyError) as error:
        logging.getLogger(__name__).warning("%s:%d: damaged, and left out: %r", path, number, error)
        return None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
