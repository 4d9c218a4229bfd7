"""Submitting to a real Slurm: chains, arrays, refusals, and names that need quotes."""

from pathlib import Path

import pytest
import yaml

from malora_dist.adapters.io.folder import open_adapter
from tests.e2e import make_folder
from tests.preemption import outcome
from tests.slurm.conftest import Cluster
from tests.slurm.runs import ended, jobs, launch, log, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow("jobs of a real Slurm, which counts its limits in minutes")]
NAME = 'my recipe\'s "best".yaml'
RUN = "runs/a b's $HOME %j"
SHORT = (
    "--train.max_steps",
    "4",
    "--train.save_steps",
    "null",
    "--train.eval_steps",
    "null",
    "--evaluation.base=false",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("submit here"))
    (folder / "recipe.yaml").rename(folder / NAME)
    return folder


@pytest.fixture(scope="module")
def by_hand(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Jobs of the repository's script with sbatch's own flags, by the run's name: one that trains and one that cannot.

    They run beside those of the other tests.
    """
    script = Path(__file__).parents[2] / "slurm" / "train.sbatch"
    flags = ["--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2", "--time=9", "--job-name=by hand"]
    recipe = yaml.safe_load((folder / NAME).read_text())
    (folder / "hand.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": "runs/hand"}))
    (folder / "bad.jsonl").write_text('{"prompt": 3}\n')
    recipe["data"]["tasks"][0]["train"] = "bad.jsonl"
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": "runs/bad"}))
    submit = ["sbatch", "--parsable", *flags, script]
    return {name: cluster.submit(*submit, f"{name}.yaml", *SHORT, folder=folder) for name in ("hand", "bad")}


@pytest.fixture(scope="module")
def chain(cluster: Cluster, folder: Path) -> list[str]:
    """Jobs of one run, each of which waits for the one before it."""
    launch(cluster, folder, NAME, *SHORT, "--output_dir", RUN, "--evaluation.tuned=false",
           "--after", "train,evaluate,convert", "--convert-to", "molora", "--name", "it's \"q\"",
           "--adapter.target_modules", "[q_proj, down_proj]")  # fmt: skip
    found = [job["job"] for job in jobs(folder / RUN)]
    # Squeue knows all three before the first has ended.
    with pytest.raises(AssertionError, match=f"job {found[0]} is there for it already"):
        launch(cluster, folder, NAME, "--output_dir", RUN)
    status = cluster.run("malora", "launch", "status", RUN, folder=folder)
    assert all(job in status for job in found)
    return found


@pytest.mark.usefixtures("chain", "by_hand")
def test_an_array_of_three_of_which_one_is_requeued(cluster: Cluster, folder: Path) -> None:
    """The last task's number as a job is that of the array."""
    longer = ("--train.max_steps=50", "--train.logging_steps=1", "--evaluation.tuned=false")
    launch(cluster, folder, NAME, *SHORT, *longer, "--output_dir", "runs/seeds", "--array", "seeds=1-3", nodes=1)
    (job,) = (job["job"] for job in jobs(folder / "runs/seeds"))
    runs = [folder / f"runs/seeds/seed-{seed}" for seed in (1, 2, 3)]
    wait_for_step(runs[2], 2)
    assert cluster.job(f"{job}_3")["JobId"] == job
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_3", folder=folder)
    for task in ("1", "2", "3"):
        assert ended(cluster, folder / "runs/seeds", f"{job}_{task}") == "COMPLETED", log(folder / "runs/seeds")
    assert [cluster.job(f"{job}_{task}")["Restarts"] for task in (1, 2, 3)] == ["0", "0", "1"]
    assert [outcome(run)["outcome"] for run in runs] == ["finished"] * 3
    assert [yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"] for run in runs] == [1, 2, 3]
    assert len({(run / "adapter/adapter_model.safetensors").read_bytes() for run in runs}) == 3
    assert (folder / f"runs/seeds/slurm/train_{job}_2.out").is_file()


def test_a_chain_through_names_that_need_quotes(cluster: Cluster, folder: Path, chain: list[str]) -> None:
    run = folder / RUN
    for job in chain:
        assert ended(cluster, run, job) == "COMPLETED", log(run)
    assert outcome(run)["outcome"] == "finished"
    assert (run / "eval.json").is_file() and open_adapter(run / "export").info.spec.method == "molora"
    assert (run / f"slurm/train_{chain[0]}.out").is_file() and (run / f"slurm/ranks_{chain[0]}/rank-1.log").is_file()
    followed = cluster.run("malora", "launch", "follow", RUN, folder=folder)
    assert f"{RUN} is finished" in followed


def test_mistakes_are_refused_before_and_by_slurm(cluster: Cluster, folder: Path) -> None:
    before = known(cluster, folder)
    for words, message in (
        (("--adapter.rr=3",), "adapter.rr=3"),
        (("--gpus-per-node", "3"), "Requested node configuration is not available"),
        (("--", "--partition=none"), "invalid partition specified: none"),
    ):
        with pytest.raises(AssertionError, match="exits 2") as refused:
            launch(cluster, folder, NAME, "--output_dir", "runs/refused", "--train.global_batch_size=24", *words)
        assert message in " ".join(str(refused.value).split())
    # Jobs of other tests may end meanwhile.
    assert known(cluster, folder) <= before
    assert not (folder / "runs/refused/slurm/jobs.jsonl").exists()


def known(cluster: Cluster, folder: Path) -> set[str]:
    """The jobs in the queue."""
    return set(cluster.run("squeue", "--noheader", "--format=%A", folder=folder).split())


def test_the_scripts_of_the_repository_by_hand(cluster: Cluster, folder: Path, by_hand: dict[str, str]) -> None:
    """On one node with two fake GPUs; a bad row is no crash."""
    job = by_hand["hand"]
    state = ended(cluster, folder / "runs/hand", job)
    said = (folder / f"by hand_{job}.out").read_text()
    assert state == "COMPLETED" and outcome(folder / "runs/hand")["outcome"] == "finished", said
    assert "2 processes on cpu" in said and (folder / f"by hand_{job}/rank-1.log").is_file()

    job = by_hand["bad"]
    assert ended(cluster, folder / "runs/bad", job) == "FAILED"
    said = (folder / f"by hand_{job}.out").read_text()
    assert cluster.job(job)["Restarts"] == "0" and cluster.job(job)["ExitCode"] == "2:0", said
    assert "bad.jsonl:1" in said and "an error in the recipe or the data; restarting would not help" in said
