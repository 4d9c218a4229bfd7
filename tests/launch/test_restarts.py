"""When a job starts its run again. tests/slurm sees real jobs do it."""

import json
from pathlib import Path

import pytest

from malora_dist.errors import CheckpointError, ConfigError, TrainingError
from malora_dist.launch.restarts import Restarts, begin, end, job_name, newest_step, read_restarts
from malora_dist.outcome import FAILED, FINISHED, PREEMPTED, write_outcome


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def ended(run: Path, outcome: str, code: int = 1, reason: str = "lost") -> None:
    write_outcome(run, outcome, code, reason=reason, step=newest_step(run), checkpoint=None)


def verdict(run: Path, **given: int) -> int:
    return end(run, 2, stop_after_steps=given.pop("stop_after_steps", None), **given).code


def test_a_crash_loop_ends_and_progress_begins_it_anew(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert begin(run, "7", 2) == Restarts("7", 1, 0, 0)
    assert verdict(run) == 75  # killed: no exit.json
    assert begin(run, "7", 2) == Restarts("7", 2, 1, 0)
    checkpoint(run, 40)
    ended(run, FAILED)
    assert verdict(run) == 75
    assert begin(run, "7", 2) == Restarts("7", 3, 0, 40) and not (run / "exit.json").exists()
    for crashes in (1, 2):
        assert verdict(run) == 75
        assert begin(run, "7", 2).without_progress == crashes
    ended(run, FAILED, reason="loss is nan")
    last = end(run, 2, stop_after_steps=None)
    assert last.code == 1 and "has ended 3 times in a row" in last.why and "step 40" in last.why
    assert "launch.max_restarts=2" in last.why and "loss is nan" in last.why
    # Slurm requeues after a lost node without asking.
    with pytest.raises(TrainingError, match=r"ended 3 times.*launch\.max_restarts=2"):
        begin(run, "7", 2)
    assert begin(run, "8", 2) == Restarts("8", 1, 0, 40)


def test_ended_by_others_is_not_in_vain_and_a_short_time_limit_is(tmp_path: Path) -> None:
    begin(tmp_path, "7", 1)
    assert verdict(tmp_path) == 75
    for start in range(2, 6):
        assert begin(tmp_path, "7", 1) == Restarts("7", start, 1, 0)
        ended(tmp_path, PREEMPTED, 75, "SIGTERM")
        assert verdict(tmp_path) == 75
    begin(tmp_path, "7", 1)
    ended(tmp_path, PREEMPTED, 75, "SIGUSR1")
    last = end(tmp_path, 1, stop_after_steps=None)
    assert last.code == 1 and "is saved at step 0 (SIGUSR1)" in last.why


def test_what_a_start_would_not_mend(tmp_path: Path) -> None:
    begin(tmp_path, "7", 9)
    assert verdict(tmp_path, exit_code=2) == 2
    ended(tmp_path, FAILED, 2)
    assert verdict(tmp_path) == 2
    ended(tmp_path, FINISHED, 0)
    assert verdict(tmp_path) == 0
    begin(tmp_path, "7", 9)
    assert (tmp_path / "exit.json").exists()
    ended(tmp_path, PREEMPTED, 75, "train.stop_after_steps is reached")
    assert verdict(tmp_path, stop_after_steps=3) == 0


def test_damage_and_a_shell(tmp_path: Path) -> None:
    (tmp_path / "restarts.json").write_text('{"job": "7"')
    with pytest.raises(CheckpointError, match=r"restarts\.json is damaged"):
        begin(tmp_path, "7", 1)
    (tmp_path / "restarts.json").write_text(json.dumps({"job": "7", "other": 1}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_restarts(tmp_path)
    with pytest.raises(ConfigError, match=r"output_dir=.* cannot be written"):
        begin(tmp_path / "restarts.json" / "run", "7", 1)
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        job_name({})
    (tmp_path / "checkpoints" / "step-000009").mkdir(parents=True)
    assert newest_step(tmp_path) == 0
