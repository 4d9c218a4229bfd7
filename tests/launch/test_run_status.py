"""How a run fares, from folders as runs write and leave them."""

import json
import os
import time
from pathlib import Path

import pytest

from malora_dist.files.exit_status import FAILED, FINISHED, PREEMPTED, write_exit_status
from malora_dist.launch.restarts import begin
from malora_dist.launch.run_status import read_run_status
from tests.launch.run_folders import begun, checkpoint, steps


def ended(run: Path, outcome: str, reason: str = "", step: int = 0) -> None:
    write_exit_status(run, outcome, 1, reason=reason, step=step, checkpoint=None)


def test_a_folder_in_which_nothing_has_begun(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        found = read_run_status(folder)
        assert (found.state, found.starts, found.restarts, found.step) == ("waiting to start", 0, 0, 0)
        assert (found.total, found.eta_seconds, found.age_seconds, found.newest, found.error) == (None,) * 5
        assert found.damaged == ()


def test_a_run_that_goes(tmp_path: Path) -> None:
    # A first step that compiles does not spoil the time left.
    run = begun(tmp_path, *steps(1, 1, 90.0), *steps(2, 30), {"kind": "eval", "step": 30})
    checkpoint(run, 10)
    checkpoint(run, 20)
    (run / "checkpoints" / ".step-000030.partial").mkdir()
    (run / "checkpoints" / "best").write_text("step-000010\n")
    os.utime(run / "metrics.jsonl", (time.time() - 50, time.time() - 50))
    found = read_run_status(run)
    assert (found.state, found.starts, found.step, found.total, found.eta_seconds) == ("running", 1, 30, 100, 140.0)
    assert found.age_seconds is not None and 49 < found.age_seconds < 80
    assert (found.newest, found.best, found.error, found.damaged) == ("step-000020", "step-000010", None, ())


def test_the_time_left_is_that_of_the_last_records(tmp_path: Path) -> None:
    assert read_run_status(begun(tmp_path, *steps(1, 40, 9.0), *steps(41, 60, 2.0))).eta_seconds == 80.0
    assert read_run_status(begun(tmp_path / "old", *steps(1, 40), total=None)).eta_seconds is None


def test_steps_that_were_lost_and_starts_that_went_on(tmp_path: Path) -> None:
    run = begun(tmp_path, *steps(1, 37), {"kind": "resume", "step": 20, "checkpoint": "step-000020"}, *steps(21, 25))
    checkpoint(run, 20)
    begin(run, "7")
    assert (read_run_status(run).step, read_run_status(run).starts, read_run_status(run).restarts) == (25, 2, 1)
    for _ in range(3):
        begin(run, "7")
    assert read_run_status(run).starts == 4, "starts that ended before they wrote a record count too"


@pytest.mark.parametrize(("outcome", "eta"), [(FINISHED, None), (PREEMPTED, 160.0), (FAILED, 160.0)])
def test_a_run_that_has_ended(tmp_path: Path, outcome: str, eta: float | None) -> None:
    run = begun(tmp_path, *steps(1, 15))
    (run / "train.log").write_text("2026-11-25 08:30:00,123 ERROR an older error\n")
    ended(run, outcome, "what happened\n  and a note", step=20)
    found = read_run_status(run)
    assert (found.state, found.step, found.eta_seconds) == (outcome, 20, eta)
    assert found.error == {FINISHED: None, PREEMPTED: "an older error", FAILED: "what happened"}[outcome]


def test_the_jobs_log_goes_before_the_runs_own(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run / "train.log").write_text("2026-11-25 08:30:00,123 ERROR of the run\n")
    (run / "job.out").write_text("nothing\n")
    assert read_run_status(run, run / "job.out").error == "of the run"
    (run / "job.out").write_text("srun: error: Node failure on node2\n")
    assert read_run_status(run, run / "job.out").error == "srun: error: Node failure on node2"


def test_half_a_record_is_one_that_is_being_written(tmp_path: Path) -> None:
    run = begun(tmp_path, *steps(1, 5))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert (read_run_status(run).step, read_run_status(run).damaged) == (5, ())


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", "{}\n{\n"), ("metrics.jsonl", '{"kind": "resume"}\n{"kind": "resume"}\n'),
     ("metrics.jsonl", b"\xff\xfe\n"), ("exit.json", "{"), ("exit.json", "[]"), ("restarts.json", ""),
     ("restarts.json", '{"7": 1}')],
)  # fmt: skip
def test_damage_is_named_and_the_rest_told(tmp_path: Path, name: str, content: str | bytes) -> None:
    run = begun(tmp_path, *steps(1, 5))
    checkpoint(run, 3)
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_run_status(run)
    assert found.state == "running" and found.newest == "step-000003"
    assert found.step == (3 if name == "metrics.jsonl" else 5)
    (message,) = found.damaged
    assert str(run / name) in message


def test_values_of_other_kinds_break_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path, {"kind": "train", "step": "5", "step_seconds": "nan"})
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best").write_bytes(b"\xff")
    (run / "exit.json").write_text(json.dumps({"outcome": "failed", "step": None}))
    (run / "restarts.json").write_text(json.dumps({"7": {"starts": "x", "in_vain": 0, "step": 0}}))
    found = read_run_status(run)
    assert (found.state, found.step, found.starts, found.best, found.eta_seconds) == ("failed", 0, 1, None, None)
