"""Runs of a tiny model as Slurm jobs: submitted as a user does, watched by their own files, compared bit by bit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from malora_dist.metrics import read_metrics, without_lost_steps
from tests.e2e import RECIPE, make_folder
from tests.preemption import Result, check_checkpoints, leftovers, outcome, result, wait_for
from tests.slurm.conftest import Cluster

STEPS = 44


def make_run_folder(folder: Path, name: str = "recipe.yaml") -> Path:
    """Model, data and a recipe of STEPS steps with ZeRO-3, a 4-bit base and the experts spread over two processes."""
    make_folder(folder)
    train = {"max_steps": STEPS, "logging_steps": 1, "eval_steps": 20, "save_steps": 10}
    recipe: dict[str, Any] = {
        **RECIPE,
        "train": RECIPE["train"] | train,
        "parallel": RECIPE["parallel"] | {"ep_size": 2},
        "evaluation": {"base": False, "batch_tokens": 128},
    }
    (folder / "recipe.yaml").unlink()
    (folder / name).write_text(yaml.safe_dump(recipe))
    return folder


def launch(cluster: Cluster, folder: Path, *words: str, nodes: int = 2, timeout: float = 60) -> str:
    """`malora launch slurm` for one process a node on the controller's host; what it prints."""
    recipe, *rest = words
    small = ["--nodes", str(nodes), "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "10"]
    return cluster.run("malora", "launch", "slurm", recipe, *small, *rest, folder=folder, timeout=timeout)


def jobs(run: Path) -> list[dict[str, Any]]:
    """What has been submitted for a run."""
    return [json.loads(line) for line in (run / "slurm" / "jobs.jsonl").read_text().splitlines()]


def log(run: Path) -> str:
    """All that the jobs of a run have said."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted((run / "slurm").glob("*.out")))


def wait_for_step(run: Path, step: int, seconds: float = 90) -> None:
    """Return when the run has logged an optimizer step."""

    def reached() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and any(record.get("step", 0) >= step for record in read_metrics(path))

    wait_for(reached, f"{run} at step {step}", seconds)


def ended(cluster: Cluster, run: Path, job: str, seconds: float = 150) -> str:
    """The state in which a job has ended, however often it began."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
    state = wait_for(lambda: next((end for end in ends if cluster.job(job)["JobState"] == end), ""), log(run), seconds)
    return str(state)


def check_finished(run: Path) -> Result:
    """A run that is complete, with nothing left over; all that it has given."""
    assert outcome(run)["outcome"] == "finished", log(run)
    assert check_checkpoints(run) == STEPS and leftovers(run) == []
    records = without_lost_steps(read_metrics(run / "metrics.jsonl"))
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, STEPS + 1))
    return result(run)


def losses(run: Path) -> Sequence[float]:
    records = without_lost_steps(read_metrics(run / "metrics.jsonl"))
    return [record["loss"] for record in records if record["kind"] == "train"]
