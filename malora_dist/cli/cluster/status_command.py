"""`malora launch status`: the runs here, their jobs, and the status of both."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from malora_dist.console.durations import as_clock
from malora_dist.errors import ConfigError
from malora_dist.launch.jobs import TRAIN, SubmittedJob, has_jobs, job_states, jobs_of, runs_of
from malora_dist.launch.log_errors import last_error, last_line
from malora_dist.launch.run_status import RUNNING, WAITING, RunStatus, read_run_status
from malora_dist.launch.scheduler import COMPLETED, FAILED, UNKNOWN, JobState

# Levels of folders searched for runs; runs/sweep/name is at 3.
DEPTH = 4
COLUMNS = ("run", "stage", "job", "state", "restarts", "step", "left", "last error")


@dataclass(frozen=True)
class StatusRow:
    """A job of a run, or a run without one."""

    run: Path
    job: SubmittedJob | None
    job_state: JobState | None
    status: RunStatus

    @property
    def is_training(self) -> bool:
        """Whether it stands for the run's training."""
        return self.job is None or self.job.stage == TRAIN

    @property
    def state(self) -> str:
        """The scheduler's word where there is one, else the run's. One without a job that seems to run was killed."""
        if self.job_state is None:
            return self.status.state
        if self.job_state.state != UNKNOWN or not self.is_training:
            return str(self.job_state)
        if self.job_state.forgotten:
            return {RUNNING: "killed", WAITING: "ended before it began"}.get(self.status.state, self.status.state)
        return f"{self.job_state}; the run: {self.status.state}"

    @property
    def error(self) -> str | None:
        """What went wrong; for a job that failed without a line that looks like an error, its last line."""
        error = self.status.error if self.is_training else None
        if self.job is not None and self.job_state is not None and self.job_state.state != COMPLETED:
            log = Path(self.job.log)
            error = error or last_error(log) or (last_line(log) if self.job_state.state == FAILED else None)
        return error

    def as_dict(self) -> dict[str, Any]:
        """Return the row for --json. Times are seconds."""
        run = asdict(self.status) | {"restarts": self.status.restarts, "error": self.error}
        named = {"run": str(self.run), "stage": self.job.stage if self.job else None}
        if self.job is None or self.job_state is None:
            return {**named, "job": None, "slurm": None, **run}
        state = {"state": self.job_state.state, "reason": self.job_state.reason}
        return {**named, "job": self.job.as_record(), self.job.scheduler: state, **run}


def status(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN_DIR]...", help="Run folders. Default: all runs with jobs below the working directory."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Show the status of runs and their jobs: job state and reason, restarts, steps, time left, last error."""
    for path in paths or []:
        if not path.is_dir():
            raise ConfigError(f"RUN_DIR={path} is not a folder")
    folders = list(paths or found_runs(Path(".")))
    rows = status_rows([run for folder in folders for run in runs_of(folder)])
    if as_json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
        return
    console = _console()
    if not rows:
        console.print("no run with jobs below this folder; name one: malora launch status RUN_DIR")
        return
    console.print(table(rows))
    for line in dict.fromkeys(f"damaged: {text}" for row in rows for text in row.status.damaged):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def found_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the folders at or below one that have submitted jobs, in the order of their names; none within another."""
    if has_jobs(folder):
        yield folder
    elif depth > 0:
        try:
            below = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        for name in below:
            if not name.startswith("."):
                yield from found_runs(folder / name, depth - 1)


def status_rows(runs: Sequence[Path]) -> list[StatusRow]:
    """Return a row for the newest job of each stage of each run; each scheduler is asked once for all."""
    jobs = {run: list({job.stage: job for job in jobs_of(run)}.values()) for run in runs}
    states = job_states(job for found in jobs.values() for job in found)
    rows = []
    for run, found in jobs.items():
        training = next((Path(job.log) for job in found if job.stage == TRAIN), None)
        seen = read_run_status(run, training)
        rows += [StatusRow(run, job, states[job.job], seen) for job in found] or [StatusRow(run, None, None, seen)]
    return rows


def table(rows: Iterable[StatusRow]) -> Table:
    """Return the rows as a table. What is the same for all stages of a run stands in the row of its training."""
    made = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    for column in made.columns:
        column.overflow = "fold"
    for row in rows:
        own = _progress(row.status) if row.is_training else ("", "", "")
        stage, job = ("", "") if row.job is None else (row.job.stage, row.job.job)
        made.add_row(*(Text(cell) for cell in (str(row.run), stage, job, row.state, *own, row.error or "")))
    return made


def _progress(seen: RunStatus) -> tuple[str, str, str]:
    left = "" if seen.eta_seconds is None else as_clock(seen.eta_seconds)
    return str(seen.restarts), progress(seen), left


def progress(seen: RunStatus) -> str:
    """Return `40/100`, or `40` while the number of steps is not known."""
    return f"{seen.step}" if seen.total is None else f"{seen.step}/{seen.total}"


def _console() -> Console:
    """Return a console; for a file, one with lines wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
