"""A recipe's job through a scheduler that only this test knows: submit, status, follow, cancel."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from malora_dist.cli.cluster import follow_command
from malora_dist.cli.cluster.app import add_scheduler
from malora_dist.cli.cluster.app import launch as launch_app
from malora_dist.launch.scheduler import (
    COMPLETED,
    FAILED,
    RUNNING,
    UNKNOWN,
    ArrayTasks,
    JobOptions,
    JobQueue,
    JobState,
    RunningJob,
    Scheduler,
)
from malora_dist.launch.schedulers import SCHEDULERS, end_time, is_requeued, job_of
from tests.cli.cluster.submitted import launch
from tests.e2e import make_folder
from tests.processes import start, wait

pytestmark = pytest.mark.e2e


class ProcessQueue(JobQueue):
    """Runs a job's one command at once, in a process that has imported everything."""

    def __init__(self) -> None:
        self.processes: dict[str, BaseProcess] = {}

    def check(self, options: JobOptions, flags: Sequence[str]) -> None:
        assert options.nodes == 1 and not flags

    def script(self, stage: str, options: JobOptions, folder: Path, array: ArrayTasks | None = None) -> str:
        assert stage == "train" and array is None and options.arguments is not None
        log = self.log(stage, str(len(self.processes) + 1), folder, array=False)
        return shlex.join([str(log), f"malora_dist.{stage}", *options.arguments])

    def log(self, stage: str, job: str, folder: Path, *, array: bool) -> Path:
        return folder.resolve() / f"{stage}_{job}.out"

    def submit_command(self, flags: Sequence[str], after: str | None = None) -> list[str]:
        return ["run", *flags]

    def submit(
        self, script: str, flags: Sequence[str], environment: Mapping[str, str], after: str | None = None
    ) -> str:
        log, module, *words = shlex.split(script)
        number = str(len(self.processes) + 1)
        self.processes[number] = start("tests.e2e:do", (module, words), Path(log), folder=Path.cwd())
        return number

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        return {job: self._state(job) for job in jobs}

    def _state(self, job: str) -> JobState:
        process = self.processes.get(job)
        if process is None:
            return JobState(UNKNOWN, "no such process", forgotten=True)
        if process.is_alive():
            return JobState(RUNNING)
        return JobState(COMPLETED) if process.exitcode == 0 else JobState(FAILED, "it fails")

    def cancel(self, job: str, environment: Mapping[str, str]) -> None:
        self.processes[job].terminate()

    def cancel_command(self, job: str) -> str:
        return f"end {job}"


class Here(Scheduler):
    name: ClassVar[str] = "here"

    def __init__(self) -> None:
        self.queue = ProcessQueue()

    def job(self, environment: Mapping[str, str]) -> RunningJob | None:
        return RunningJob(environment["HERE"], "this node", 1) if "HERE" in environment else None

    def is_requeued(self, environment: Mapping[str, str]) -> bool:
        return environment.get("HERE_AGAIN") == "yes"

    def end_time(self, environment: Mapping[str, str]) -> float | None:
        return float(environment["HERE_ENDS"]) if "HERE_ENDS" in environment else None


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProcessQueue:
    """Of the scheduler `here`, in a folder with a recipe in which follow looks often."""
    scheduler = Here()
    monkeypatch.setitem(SCHEDULERS, scheduler.name, scheduler)
    monkeypatch.setattr(launch_app, "registered_commands", [*launch_app.registered_commands])
    add_scheduler(scheduler.name)
    monkeypatch.chdir(make_folder(tmp_path))
    for name in ("LOG_SECONDS", "STATE_SECONDS", "OWN_STATE_SECONDS"):
        monkeypatch.setattr(follow_command, name, 0.05)
    return scheduler.queue


WORDS = ("recipe.yaml", "--gpus-per-node", "0", "--train.max_steps", "2", "--train.eval_steps", "null")


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert launch("status", "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_recipes_job(queue: ProcessQueue, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("here", *WORDS, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("$ run <<'SCRIPT'\n") and not queue.processes
    assert launch("here", *WORDS) == 0
    assert "cancel it:  end 1 " in capsys.readouterr().out
    (row,) = rows(capsys)
    assert (row["run"], row["stage"], row["job"]["job"]) == ("runs/tiny", "train", "1")
    assert row["here"]["state"] in (RUNNING, COMPLETED) and Path("runs/tiny/here/jobs.jsonl").is_file()
    if queue.processes["1"].is_alive():
        assert launch("here", *WORDS) == 2
        assert "job 1 is there for it already (running); end 1 first" in " ".join(capsys.readouterr().err.split())
    assert launch("follow", "runs/tiny") == 0
    followed = capsys.readouterr().out
    assert "step 2/2" in followed and followed.endswith("-- job 1: completed; run finished, step 2/2\n")
    wait(queue.processes.values())
    assert [(row["here"]["state"], row["step"]) for row in rows(capsys)] == [(COMPLETED, 2)]


def test_what_a_process_asks_of_its_scheduler(queue: ProcessQueue) -> None:
    environment = {"HERE": "7", "HERE_AGAIN": "yes", "HERE_ENDS": "2000"}
    assert job_of(environment).id == "7" and is_requeued(environment) and end_time(environment) == 2000
    assert not is_requeued({}) and end_time({}) is None
