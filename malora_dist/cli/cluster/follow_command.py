"""`malora launch follow`: a run's training job as it goes, until it ends."""

import codecs
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from malora_dist.cli.cluster.status_command import progress
from malora_dist.console.durations import as_clock
from malora_dist.errors import ConfigError
from malora_dist.files import run_files
from malora_dist.files.exit_status import FAILED, FINISHED
from malora_dist.launch.jobs import TRAIN, SubmittedJob, job_states, jobs_of, runs_of
from malora_dist.launch.run_status import RUNNING, WAITING, RunStatus, read_run_status
from malora_dist.launch.scheduler import COMPLETED, UNKNOWN, JobState
from malora_dist.launch.schedulers import queues

LAST_LINES = 20
LOG_SECONDS = 0.5
# A cluster's controller serves thousands of users.
STATE_SECONDS, OWN_STATE_SECONDS = 10, 2
INTERRUPTED = 130


def follow(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder.")]) -> None:
    """Print the log of a run as it grows, over all starts of its job, and the job's states, until it ends.

    Exit code 0 if it finishes, 1 if it fails. Ctrl-C ends the following, not the job.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"RUN_DIR={run_dir} is not a folder")
    jobs = [job for job in jobs_of(run_dir) if job.stage == TRAIN]
    runs = runs_of(run_dir)
    if not jobs and runs != [run_dir]:
        names = ", ".join(run.name for run in runs)
        raise ConfigError(f"RUN_DIR={run_dir} holds the runs of an array: {names}; follow one of them")
    following = _Following(run_dir, jobs[-1] if jobs else None)
    try:
        code = following.until_the_end()
    except KeyboardInterrupt:
        print(f"\n{following.farewell()}")
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(code)


class Tail:
    """What is new in a file that grows, from its last lines on. It need not exist yet; a shorter one is a new one."""

    def __init__(self, path: Path, lines: int = LAST_LINES) -> None:
        self.path, self._lines = path, lines
        self._at: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> str:
        """Return the text that was added since the last call."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if self._at is None:
                    self._at = self._start(size)
                file.seek(self._at if size >= self._at else 0)
                content = file.read()
                self._at = file.tell()
        except OSError:
            # A network file system may lose it for a moment.
            return ""
        return self._decoder.decode(content)

    def _start(self, size: int) -> int:
        """Return the offset at which the last lines begin, at most 64 KiB before the end."""
        with self.path.open("rb") as file:
            at = max(0, size - 2**16)
            file.seek(at)
            content = file.read(size - at)
        last = b"".join(content.splitlines(keepends=True)[-self._lines :])
        return size - len(last)


@dataclass
class _Following:
    run: Path
    job: SubmittedJob | None
    said: tuple[str, str] = ("", "")
    within_line: bool = False
    tail: Tail = field(init=False)

    def __post_init__(self) -> None:
        self.tail = Tail(Path(self.job.log) if self.job else self.run / run_files.LOG)

    def until_the_end(self) -> int:
        """Print log and states; return the exit code."""
        code: int | None = None
        while True:
            self._print_states(state := self._job_state(), seen := read_run_status(self.run))
            before, code = code, _code(state, seen)
            # Polled twice: a job that is requeued looks ended for a moment.
            if code is not None and (before is not None or state is None):
                self._print_log()
                return code
            self._watch(OWN_STATE_SECONDS if code is not None or self.job is None else STATE_SECONDS)

    def farewell(self) -> str:
        """Return the message for the user after Ctrl-C."""
        if self.job is None:
            return f"no longer following; {self.run} continues"
        end = queues()[self.job.scheduler].cancel_command(self.job.job)
        return f"no longer following; job {self.job.job} continues ({end} cancels it)"

    def _watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            self._print_log()
            if time.monotonic() > until:
                return
            time.sleep(LOG_SECONDS)

    def _print_log(self) -> None:
        text = self.tail.read()
        if text:
            print(text, end="", flush=True)
            self.within_line = not text.endswith("\n")

    def _job_state(self) -> JobState | None:
        return None if self.job is None else job_states([self.job])[self.job.job]

    def _print_states(self, state: JobState | None, seen: RunStatus) -> None:
        now = (str(state or ""), seen.state)
        if now != self.said:
            self.said = now
            name = f"job {self.job.job}: {state}" if self.job else str(self.run)
            left = f", {as_clock(seen.eta_seconds)} left" if seen.eta_seconds and seen.state == RUNNING else ""
            steps = "" if seen.state == WAITING else f", step {progress(seen)}{left}"
            print("\n" * self.within_line + f"-- {name}; run {seen.state}{steps}")
            self.within_line = False


def _code(state: JobState | None, seen: RunStatus) -> int | None:
    """Return the exit code, None while the job waits or runs."""
    if state is None:
        return None if seen.state in (WAITING, RUNNING) else int(seen.state != FINISHED)
    if state.state == UNKNOWN:
        # The scheduler is not here, does not answer, or has forgotten the job.
        return int(seen.state != FINISHED) if state.forgotten or seen.state in (FINISHED, FAILED) else None
    return int(state.state != COMPLETED) if state.ended else None
