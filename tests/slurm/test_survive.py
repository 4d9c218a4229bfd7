"""Jobs that a cluster stops in every way it has, compared bit by bit with one that nothing stops."""

import json
import subprocess
from pathlib import Path

import pytest

from malora_dist.metrics import read_metrics
from tests.e2e import launch as run_here
from tests.preemption import Result, check_checkpoints, leftovers, outcome, wait_for
from tests.slurm.conftest import Cluster
from tests.slurm.runs import check_finished, ended, jobs, launch, log, losses, make_run_folder, wait_for_step

pytestmark = pytest.mark.timeout(400)
RECIPE = "recipe.yaml"
FREEZE = 'for p in /proc/[0-9]*; do grep -qsz "^LOCAL_RANK=" $p/environ && kill -STOP "${p#/proc/}"; done; true'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("survive"))


@pytest.fixture(scope="module")
def whole(cluster: Cluster, folder: Path) -> Result:
    """What a run on two nodes gives that nothing stops; beside it, one that the time limit stops has begun."""
    run = folder / "runs" / "whole"
    launch(cluster, folder, RECIPE, "--output_dir", "runs/limit", "--time", "1", "--save-before", "55")
    limited = jobs(folder / "runs" / "limit")[0]["job"]
    said = launch(cluster, folder, RECIPE, "--output_dir", "runs/whole")
    # Once is enough.
    wait_for(lambda: cluster.job(limited)["Restarts"] != "0", f"job {limited} is requeued", 90)
    cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=10", folder=folder)
    job = jobs(run)[0]["job"]
    assert f"submitted train as job {job}" in said
    assert ended(cluster, run, job) == "COMPLETED", log(run)
    assert cluster.job(job)["Restarts"] == "0"
    return check_finished(run)


def resumed(run: Path) -> list[int]:
    """After which steps the run went on."""
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "resume"]


def test_two_nodes_equal_one_process(whole: Result, folder: Path) -> None:
    """ZeRO-3, a 4-bit base and spread experts over two addresses, against one process with neither."""
    done = run_here(
        ["malora", "train", RECIPE, "--num_gpus", "1", "--output_dir", "runs/one", "--parallel.ep_size", "1",
         "--parallel.zero_stage", "0", "--train.per_device_train_batch_size", "4"],
        folder,
    )  # fmt: skip
    assert done.code == 0, done.output
    two, one = losses(folder / "runs/whole"), losses(folder / "runs/one")
    assert two[:10] == pytest.approx(one[:10], rel=2e-6) and two == pytest.approx(one, rel=1e-3)
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
    assert f"{run.relative_to(folder)} is saved at step {resumed(run)[0]} (SIGUSR1): once more, from there" in log(run)
    assert "ChildFailedError" not in log(run)
    assert check_finished(run) == whole


@pytest.mark.parametrize(("how", "node"), [("lose", "node1"), ("cut", "node2"), ("kill_daemon", "node2")])
def test_a_lost_node(mended: Cluster, folder: Path, whole: Result, how: str, node: str) -> None:
    """A machine gone with all its processes and the job's script, a pulled cable, a hung node with a dead slurmd."""
    cluster = mended
    run = folder / "runs" / how
    launch(cluster, folder, RECIPE, "--output_dir", f"runs/{how}", "--parallel.timeout_seconds", "15")
    job = jobs(run)[0]["job"]
    wait_for_step(run, 12)
    if how == "kill_daemon":
        # With slurmd alone dead, the processes would be done before Slurm misses it.
        subprocess.run(cluster.command("bash", "-c", FREEZE, host=node), check=True, timeout=30)
    getattr(cluster, how)(node)
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", f"job {job} is requeued", 60)
    check_checkpoints(run)
    cluster.revive(node)
    assert ended(cluster, run, job) == "COMPLETED", log(run)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert resumed(run) and all(step >= 10 and step % 10 == 0 for step in resumed(run))
    assert check_finished(run) == whole


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
    wait_for(lambda: len(resumed(run)) == 2, f"{run} goes on\n{log(run)}", 60)
    wait_for_step(run, resumed(run)[1] + 3)
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "1", folder=folder)
    assert ended(cluster, run, second) == "COMPLETED", log(run)
    assert cluster.job(second)["Restarts"] == "2" and len(resumed(run)) == 3
    # Each was told by TERM, had time to save, and lost no step.
    assert resumed(run)[0] == stopped["step"] and min(resumed(run)[1:]) > stopped["step"] + 3
    assert check_finished(run) == whole


def test_a_crash_loop_ends_and_takes_its_chain_with_it(cluster: Cluster, folder: Path) -> None:
    """A process that is killed at every start, before the first checkpoint."""
    run = folder / "runs" / "crash"
    setup = '["torchrun() { sleep 1; exit 9; }", "export -f torchrun"]'
    words = ("--output_dir=runs/crash", "--parallel.ep_size=1", "--launch.max_restarts=1", "--launch.setup", setup)
    launch(cluster, folder, RECIPE, *words, "--after", "train,evaluate", nodes=1)
    train, evaluate = (job["job"] for job in jobs(run))
    assert ended(cluster, run, train) == "FAILED"
    assert cluster.job(train)["Restarts"] == "1"
    assert "It has ended 2 times in a row without a newer checkpoint than step 0" in log(run)
    assert ended(cluster, run, evaluate, 30) == "CANCELLED"
