"""A run in the steps of a real Slurm, told to end by scancel, and its time limit."""

import re
import signal
import time
from pathlib import Path

import pytest

from malora_dist.tracking.metrics import read_metrics, without_lost_steps
from tests.preemption import Launched, check_checkpoints, leftovers, make_run_folder, outcome
from tests.slurm.conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow("jobs of a real Slurm, which counts its limits in minutes")]

WAIT = {"rank": 1, "on": "poll", "at": "backward", "step": 4, "wait": True}
# What is started by Slurm's daemons is no child of srun.
IDLE = 300
LIMIT = "import malora_dist.launch.schedulers as s, os, time; print('left', s.end_time(os.environ) - time.time())"


def test_a_run_told_to_end_by_scancel_goes_on_in_the_next_step(cluster: Cluster, tmp_path: Path) -> None:
    make_run_folder(tmp_path)
    run, arguments = tmp_path / "runs" / "tiny", ["--evaluation.base", "false", "--evaluation.tuned", "false"]
    step = [
        "timeout",
        str(IDLE),
        "srun",
        "--job-name",
        "run",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    command = cluster.command(*step, "python", "-m", "tests.preemption_workers")

    with Launched(command, tmp_path, "first", arguments, IDLE, traps=[WAIT]) as first:
        first.waits()
        job = cluster.run("squeue", "--noheader", "--name", "run", "--format", "%A", folder=tmp_path).strip()
        cluster.run("scancel", "--signal=USR1", f"{job}.0", folder=tmp_path)
        assert first.end() == 75, first.log()
    ended = outcome(run)
    assert (ended["outcome"], ended["exit_code"], ended["reason"]) == ("preempted", 75, "SIGUSR1")
    assert ended["step"] == check_checkpoints(run) and ended["step"] in (3, 4) and leftovers(run) == []
    assert {(here["rank"], here["code"]) for here in first.heard()} == {(0, signal.SIGUSR1), (1, signal.SIGUSR1)}

    with Launched(command, tmp_path, "second", arguments, IDLE) as second:
        assert second.end() == 0, second.log()
    assert outcome(run)["outcome"] == "finished" and check_checkpoints(run) == 12
    records = without_lost_steps(read_metrics(run / "metrics.jsonl"))
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 3, 6, 9, 12]


def test_the_time_limit_is_slurms(cluster: Cluster, tmp_path: Path) -> None:
    began = time.monotonic()
    said = cluster.run("srun", "--time=10", "python", "-c", LIMIT, folder=tmp_path)
    (left,) = re.findall(r"left ([\d.]+)", said)
    # Slurm says it in whole seconds, and the step began before the question.
    assert 600 - (time.monotonic() - began) - 2 < float(left) <= 601
