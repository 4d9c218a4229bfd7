"""Jobs that a cluster stops in every way it has, compared bit by bit with one that nothing stops."""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from malora_dist.tracking.metrics import read_metrics
from tests.e2e import Finished
from tests.e2e import launch as run_here
from tests.preemption import Result, check_checkpoints, leftovers, outcome
from tests.slurm.conftest import Cluster
from tests.slurm.runs import (
    check_finished,
    ended,
    jobs,
    launch,
    log,
    losses,
    make_run_folder,
    wait_for,
    wait_for_step,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow("jobs of a real Slurm, which counts its limits in minutes")]
RECIPE = "recipe.yaml"
LOSSES = (("lose", "node1"), ("cut", "node2"), ("kill_daemon", "node2"))
FREEZE = 'for p in /proc/[0-9]*; do grep -qsz "^LOCAL_RANK=" $p/environ && kill -STOP "${p#/proc/}"; done; true'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("survive"))


@pytest.fixture(scope="module")
def begun(cluster: Cluster, folder: Path) -> dict[str, str]:
    """What `malora launch slurm` says of jobs that run side by side.

    One that the time limit stops, one that nothing stops, and one whose process is killed at every start.
    """
    # Slurm's signal comes some seconds after the start; a busy machine then has minutes to hear of it.
    limit = ("--output_dir", "runs/limit", "--time", "3", "--save-before", "175")
    said = {"limit": launch(cluster, folder, RECIPE, *limit)}
    said["whole"] = launch(cluster, folder, RECIPE, "--output_dir", "runs/whole")
    limited = jobs(folder / "runs" / "limit")[0]["job"]
    # Once is enough.
    wait_for(lambda: cluster.job(limited)["Restarts"] != "0", f"job {limited} is requeued")
    cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=10", folder=folder)
    setup = '["torchrun() { sleep 1; exit 9; }", "export -f torchrun"]'
    words = ("--output_dir=runs/crash", "--parallel.ep_size=1", "--launch.max_restarts=1", "--launch.setup", setup)
    said["crash"] = launch(cluster, folder, RECIPE, *words, "--after", "train,evaluate", nodes=1)
    return said


@pytest.fixture(scope="module")
def one(folder: Path, begun: dict[str, str]) -> Iterator[Future[Finished]]:
    """The same run in one process of this machine, beside the jobs."""
    words = ["--num_gpus", "1", "--output_dir", "runs/one", "--parallel.ep_size", "1", "--parallel.zero_stage", "0"]
    command = ["malora", "train", RECIPE, *words, "--train.per_device_train_batch_size", "4"]
    with ThreadPoolExecutor() as pool:
        yield pool.submit(run_here, command, folder)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, folder: Path, begun: dict[str, str], one: Future[Finished]) -> Result:
    """What a run on two nodes gives that nothing stops."""
    run = folder / "runs" / "whole"
    job = jobs(run)[0]["job"]
    assert f"submitted train as job {job}" in begun["whole"]
    assert ended(cluster, run, job) == "COMPLETED", log(run)
    assert cluster.job(job)["Restarts"] == "0"
    return check_finished(run)


def resumed(run: Path) -> list[int]:
    """After which steps the run went on."""
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "resume"]


def test_two_nodes_equal_one_process(whole: Result, folder: Path, one: Future[Finished]) -> None:
    """ZeRO-3, a 4-bit base and spread experts over two addresses, against one process with neither."""
    done = one.result()
    assert done.code == 0, done.output
    two, alone = losses(folder / "runs/whole"), losses(folder / "runs/one")
    assert two[:10] == pytest.approx(alone[:10], rel=2e-6) and two == pytest.approx(alone, rel=1e-3)
    places = json.loads((folder / "runs/whole/metrics.jsonl").read_text().splitlines()[0])
    assert places["world_size"] == 2
    ranks = folder / "runs/whole/slurm" / f"ranks_{jobs(folder / 'runs/whole')[0]['job']}"
    assert sorted(path.name for path in ranks.glob("*.log")) == ["rank-0.log", "rank-1.log"]


def test_the_time_limit_and_a_requeue(cluster: Cluster, folder: Path, whole: Result) -> None:
    """Slurm's own signal before the limit: saved, requeued, and nothing is different in the end."""
    run = folder / "runs" / "limit"
    job = jobs(run)[0]["job"]
    assert ended(cluster, run, job) == "COMPLETED", log(run)
    assert int(cluster.job(job)["Restarts"]) >= 1 and len(resumed(run)) >= 1, log(run)
    assert f"{run.relative_to(folder)} was saved at step {resumed(run)[0]} (SIGUSR1): restarting from there" in log(run)
    assert "ChildFailedError" not in log(run)
    assert check_finished(run) == whole


def test_a_crash_loop_ends_and_takes_its_chain_with_it(cluster: Cluster, folder: Path, begun: dict[str, str]) -> None:
    """A process that is killed at every start, before the first checkpoint."""
    run = folder / "runs" / "crash"
    train, evaluate = (job["job"] for job in jobs(run))
    assert ended(cluster, run, train) == "FAILED"
    assert cluster.job(train)["Restarts"] == "1"
    assert "It has ended 2 times in a row without a newer checkpoint than step 0" in log(run)
    assert ended(cluster, run, evaluate) == "CANCELLED"


def test_lost_nodes(mended: Cluster, folder: Path, whole: Result) -> None:
    """One run, through a machine gone with its processes and the job's script, a pulled cable, and a hung node."""
    cluster = mended
    run = folder / "runs" / "lost"
    launch(cluster, folder, RECIPE, "--output_dir", "runs/lost", "--parallel.timeout_seconds", "15")
    job = jobs(run)[0]["job"]
    for number, (how, node) in enumerate(LOSSES, start=1):
        wait_for_step(run, 10 * number + 2)
        lose(cluster, how, node)
        wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", f"job {job} is requeued")
        check_checkpoints(run)
        cluster.revive(node)
        wait_for(lambda number=number: len(resumed(run)) >= number, f"{run} goes on\n{log(run)}")
    assert ended(cluster, run, job) == "COMPLETED", log(run)
    assert int(cluster.job(job)["Restarts"]) >= len(LOSSES)
    assert all(step >= 10 and step % 10 == 0 for step in resumed(run))
    assert check_finished(run) == whole


def lose(cluster: Cluster, how: str, node: str) -> None:
    if how == "kill_daemon":
        # With slurmd alone dead, the processes would be done before Slurm misses it.
        subprocess.run(cluster.command("bash", "-c", FREEZE, host=node), check=True, timeout=100)
    getattr(cluster, how)(node)


def test_scancel_and_requeue_and_preemption(cluster: Cluster, folder: Path, whole: Result) -> None:
    """One process for each fake GPU by srun, ended by scancel, submitted again, requeued by hand, and preempted."""
    run, words = folder / "runs" / "tasks", ("--output_dir", "runs/tasks", "--gpus-per-node", "1", "--start", "tasks")
    launch(cluster, folder, RECIPE, *words)
    first = jobs(run)[0]["job"]
    wait_for_step(run, 12)
    cluster.run("scancel", first, folder=folder)
    assert ended(cluster, run, first) == "CANCELLED"
    wait_for(lambda: (run / "exit.json").exists(), "exit.json")
    stopped = outcome(run)
    assert (stopped["outcome"], stopped["reason"]) == ("preempted", "SIGTERM") and stopped["step"] >= 12
    assert check_checkpoints(run) == stopped["step"] and leftovers(run) == []
    launch(cluster, folder, RECIPE, *words)
    second = jobs(run)[1]["job"]
    wait_for_step(run, stopped["step"] + 5)
    cluster.run("scontrol", "requeue", second, folder=folder)
    wait_for(lambda: len(resumed(run)) == 2, f"{run} goes on\n{log(run)}")
    wait_for_step(run, resumed(run)[1] + 3)
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "1", folder=folder)
    assert ended(cluster, run, second) == "COMPLETED", log(run)
    assert cluster.job(second)["Restarts"] == "2" and len(resumed(run)) == 3
    # Each was told by TERM, had time to save, and lost no step.
    assert resumed(run)[0] == stopped["step"] and min(resumed(run)[1:]) > stopped["step"] + 3
    assert check_finished(run) == whole
