"""`malora launch status` over folders as submitted runs leave them. tests/slurm has a real Slurm."""

import json
from pathlib import Path
from typing import Any

import pytest

from malora_dist.files.exit_status import FAILED, FINISHED, write_exit_status
from malora_dist.launch.jobs import JOBS_FILE
from malora_dist.launch.restarts import begin
from tests.cli.cluster.submitted import job, launch, submitted
from tests.launch.run_folders import begun, steps
from tests.launch.slurm_clients import NO_CONTROLLER, Clients, make_clients

pytestmark = pytest.mark.e2e


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """Of the folder in which the command is then called."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return make_clients(tmp_path / "bin", monkeypatch)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    launch("status", *arguments)
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said(capsys, "--json", *arguments))
    return found


def test_the_stages_of_a_run(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted(Path("runs/a"), job("1", Path("runs/a")), job("2", Path("runs/a"), "evaluate", after="1"))
    begun(run, *steps(1, 40))
    for _ in range(3):
        begin(run, "1")
    Path(job("1", run).log).write_text("slurmstepd: error: *** JOB 1 ON n1 CANCELLED DUE TO NODE FAILURE ***\n")
    clients.say("squeue", "1|RUNNING|None\n2|PENDING|Dependency\n")
    lines = [line.split("  ") for line in said(capsys).splitlines()]
    found = [[cell.strip() for cell in line if cell.strip()] for line in lines if any(line)]
    assert found[0] == ["run", "stage", "job", "state", "restarts", "step", "left", "last error"]
    assert found[2] == [
        "runs/a", "train", "1", "running", "2", "40/100", "0:02:00",
        "slurmstepd: error: *** JOB 1 ON n1 CANCELLED DUE TO NODE FAILURE ***",
    ]  # fmt: skip
    assert found[3] == ["runs/a", "evaluate", "2", "pending (waits for the job before it)"]
    assert len(clients.calls) == 1


def test_json_has_all_that_is_known(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted(begun(Path("a"), *steps(1, 40)), job("1", Path("a")))
    clients.say("squeue", "1|PENDING|BeginTime\n")
    (row,) = rows(capsys)
    assert row.pop("age_seconds") >= 0
    assert row.pop("job")["log"] == job("1", run).log
    assert row == {
        "run": "a", "stage": "train", "slurm": {"state": "PENDING", "reason": "starts after a pause"},
        "state": "running", "starts": 1, "restarts": 0, "step": 40, "total": 100, "eta_seconds": 120.0,
        "newest": None, "best": None, "error": None, "damaged": [],
    }  # fmt: skip


def test_runs_are_found_below_this_folder(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "runs/a", "runs/sweep/x/y", ".hidden/c", "runs/a/export/d", "1/2/3/4/5"):
        submitted(Path(name), job("1", Path(name)))
    begun(Path("by-hand"))
    assert [row["run"] for row in rows(capsys)] == ["b", "runs/a", "runs/sweep/x/y"]
    submitted(Path("."), job("2", Path(".")))
    assert [row["run"] for row in rows(capsys)] == ["."]


def test_every_run_of_an_array(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    array = job("7", Path("runs/a"), array="1-3%2", log=str(Path("runs/a/slurm/train_7_%a.out").resolve()))
    run = submitted(Path("runs/a"), array)
    begun(run / "seed-2", *steps(1, 9))
    Path("runs/a/slurm/train_7_2.out").write_text("srun: error: node1: task 0: Killed\n")
    clients.say("squeue", "7_3|PENDING|JobArrayTaskLimit\n7_1|RUNNING|None\n7_2|FAILED|NonZeroExitCode\n")
    found = rows(capsys)
    assert [row["run"] for row in found] == [f"runs/a/seed-{number}" for number in (1, 2, 3)]
    assert [row["slurm"]["state"] for row in found] == ["RUNNING", "FAILED", "PENDING"]
    assert [row["step"] for row in found] == [0, 9, 0]
    assert found[1]["error"] == "srun: error: node1: task 0: Killed"
    assert rows(capsys, "runs/a/seed-2") == [found[1] | {"age_seconds": pytest.approx(0, abs=60)}]


def test_the_newest_job_of_a_stage(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(Path("a"), job("1", Path("a")), job("2", Path("a"), "evaluate"), job("3", Path("a")))
    assert [row["job"]["job"] for row in rows(capsys)] == ["3", "2"]


def test_a_run_without_jobs_says_its_own_state(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(Path("by-hand"), *steps(1, 4))
    write_exit_status(run, FAILED, 1, reason="loss is nan", step=4, checkpoint=None)
    assert " failed " in said(capsys, "by-hand") and "loss is nan" in said(capsys, "by-hand")
    assert clients.calls == []
    assert "no run with jobs" in said(capsys)


@pytest.mark.parametrize(
    ("outcome", "begins", "state"),
    [(None, True, "killed"), (None, False, "ended before it began"), (FINISHED, True, "finished")],
)
def test_what_slurm_has_forgotten(
    clients: Clients, capsys: pytest.CaptureFixture[str], outcome: str | None, begins: bool, state: str
) -> None:
    run = submitted(Path("a"), job("1", Path("a")))
    if begins:
        begun(run, *steps(1, 4))
    if outcome is not None:
        write_exit_status(run, outcome, 0, reason="", step=4, checkpoint=None)
    assert f" {state} " in said(capsys)


def test_a_slurm_that_does_not_answer(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(begun(Path("a"), *steps(1, 4)), job("1", Path("a")))
    clients.say("squeue", error=NO_CONTROLLER, code=1)
    text = " ".join(said(capsys).split())
    assert "unknown (squeue: slurm_load_jobs error" in text and "; the run: running" in text


def test_the_last_word_of_a_job_that_failed(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted(Path("a"), job("1", Path("a")), job("2", Path("a"), "evaluate"))
    Path(job("1", run).log).write_text("train.max_steps=0: must be at least 1\n\n")
    Path(job("2", run, "evaluate").log).write_text("Traceback (most recent call last):\n  File\nOSError: no disk\n")
    clients.say("squeue", "1|FAILED|NonZeroExitCode\n2|FAILED|NonZeroExitCode\n")
    assert [row["error"] for row in rows(capsys)] == ["train.max_steps=0: must be at least 1", "OSError: no disk"]
    clients.say("squeue", "1|RUNNING|None\n2|COMPLETED|None\n")
    assert [row["error"] for row in rows(capsys)] == [None, None]


def test_damage_is_named(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted(begun(Path("a")), job("1", Path("a")))
    (run / "exit.json").write_text("{")
    with (run / "slurm" / JOBS_FILE).open("a") as file:
        file.write("{")
    assert "damaged: a/exit.json is damaged" in said(capsys)


def test_what_is_no_folder(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("status", "missing") == 2
    assert "RUN_DIR=missing is not a folder" in capsys.readouterr().err
