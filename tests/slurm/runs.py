"""Runs of a tiny model as Slurm jobs: submitted as a user does, watched by their own files, compared bit by bit."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from malora_dist.tracking.metrics import read_metrics, without_lost_steps
from tests import preemption
from tests.e2e import RECIPE, make_folder
from tests.preemption import Result, check_checkpoints, leftovers, outcome, result
from tests.slurm.conftest import Cluster

STEPS = 44
LONGEST = 300
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def wait_for(happened: Callable[[], Any], what: str) -> Any:
    """Return what `happened` gives once that is true; by the clock, for Slurm's daemons sleep on purpose."""
    until = time.monotonic() + LONGEST
    return preemption.wait_for(happened, what, lambda: time.monotonic() > until)


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


def launch(cluster: Cluster, folder: Path, *words: str, nodes: int = 2) -> str:
    """`malora launch slurm` for one process a node on the controller's host; what it prints."""
    recipe, *rest = words
    small = ["--nodes", str(nodes), "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "10"]
    return cluster.run("malora", "launch", "slurm", recipe, *small, *rest, folder=folder)


def jobs(run: Path) -> list[dict[str, Any]]:
    """What has been submitted for a run."""
    return [json.loads(line) for line in (run / "slurm" / "jobs.jsonl").read_text().splitlines()]


def log(run: Path) -> str:
    """All that the jobs of a run have said."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted((run / "slurm").glob("*.out")))


def wait_for_step(run: Path, step: int) -> None:
    """Return when the run has logged an optimizer step."""

    def reached() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and any(record.get("step", 0) >= step for record in read_metrics(path))

    wait_for(reached, f"{run} at step {step}\n{log(run)}")


def ended(cluster: Cluster, run: Path, job: str) -> str:
    """The state in which a job has ended, however often it began."""

    def end() -> str:
        state = cluster.job(job)["JobState"]
        return state if state in ENDED else ""

    return str(wait_for(end, f"job {job} ends\n{log(run)}"))


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
