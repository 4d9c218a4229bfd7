"""When a job starts its run again. tests/slurm sees real jobs do it."""

import json
from pathlib import Path

import pytest

from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.exit_status import FAILED, FINISHED, PREEMPTED, write_exit_status
from malora_dist.launch.restarts import Restarts, begin, end, newest_step, read_restarts
from tests.launch.run_folders import checkpoint


def ended(run: Path, outcome: str, code: int = 1, reason: str = "lost") -> None:
    write_exit_status(run, outcome, code, reason=reason, step=newest_step(run), checkpoint=None)


def decision(run: Path, job: str = "7", exit_code: int | None = None, stop_after_steps: int | None = None) -> int:
    return end(run, job, 2, stop_after_steps=stop_after_steps, exit_code=exit_code).code


def test_a_crash_loop_ends_and_progress_begins_it_anew(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert begin(run, "7") == Restarts(1, 0, 0)
    assert decision(run) == 75  # killed: no exit.json
    assert begin(run, "7") == Restarts(2, 1, 0)
    (run / "config.yaml").touch()
    checkpoint(run, 40)
    ended(run, FAILED)
    assert decision(run) == 75
    assert begin(run, "7") == Restarts(3, 0, 40) and not (run / "exit.json").exists()
    for vain in (1, 2):
        assert decision(run) == 75
        assert begin(run, "7").without_progress == vain
    # Another job of the same run has a count of its own, and leaves this one alone.
    assert begin(run, "8") == Restarts(1, 0, 40) and decision(run, "8") == 75
    ended(run, FAILED, reason="loss is nan")
    last = end(run, "7", 2, stop_after_steps=None, exit_code=None)
    assert last.code == 1 and "ended 3 times in a row" in last.why and "step 40" in last.why
    assert "launch.max_restarts=2" in last.why and "loss is nan" in last.why
    assert list(read_restarts(run)) == ["7", "8"]


def test_what_slurm_ends_is_not_in_vain_and_a_short_time_limit_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    begin(tmp_path, "7")
    assert decision(tmp_path) == 75
    for start in range(2, 6):  # a lost node: nobody asks what to do
        assert begin(tmp_path, "7") == Restarts(start, 1, 0)
    for start in range(6, 9):
        assert begin(tmp_path, "7") == Restarts(start, 1, 0)
        ended(tmp_path, PREEMPTED, 75, "SIGTERM")
        assert decision(tmp_path) == 75
    for code in (75, 1):
        begin(tmp_path, "7")
        ended(tmp_path, PREEMPTED, 75, "SIGUSR1")
        last = end(tmp_path, "7", 2, stop_after_steps=None, exit_code=75)
        assert last.code == code and "was saved at step 0 (SIGUSR1)" in last.why


def test_what_a_start_would_not_mend(tmp_path: Path) -> None:
    begin(tmp_path, "7")
    (tmp_path / "config.yaml").touch()
    assert decision(tmp_path, exit_code=2) == 2
    ended(tmp_path, FAILED, 2)
    assert decision(tmp_path) == 2
    ended(tmp_path, FINISHED, 0)
    assert decision(tmp_path) == 0
    begin(tmp_path, "7")
    assert (tmp_path / "exit.json").exists()
    ended(tmp_path, PREEMPTED, 75, "train.stop_after_steps is reached")
    assert decision(tmp_path, stop_after_steps=3) == 0


def test_damage_and_a_shell(tmp_path: Path) -> None:
    (tmp_path / "restarts.json").write_text('{"job": "7"')
    with pytest.raises(CheckpointError, match=r"restarts\.json is damaged"):
        begin(tmp_path, "7")
    (tmp_path / "restarts.json").write_text(json.dumps({"7": {"other": 1}}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_restarts(tmp_path)
    with pytest.raises(ConfigError, match=r"output_dir=.* cannot be written"):
        begin(tmp_path / "restarts.json" / "run", "7")
    (tmp_path / "checkpoints" / "step-000009").mkdir(parents=True)
    # Names that no run resumes from count for no progress either.
    for name in ("step-5", "step-0000007", "step-\u0663\u0663\u0663\u0663\u0663\u0663", ".step-000008.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert newest_step(tmp_path) == 0
    (tmp_path / "checkpoints" / "step-000009" / "manifest.json").touch()
    assert newest_step(tmp_path) == 9


def test_a_folder_in_which_no_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(ConfigError, match="holds report and no config.yaml: no run can go on there"):
        begin(tmp_path, "7")
