"""A suite of a tiny model, and results of its runs that nothing was trained for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from malora_dist.bench.quality.results import FAILED, FINISHED, Result, facts_of
from malora_dist.bench.quality.runs import Bench, Run
from malora_dist.bench.quality.suite import load_suite
from tests.e2e import make_tasks, make_tiny_llama
from tests.tiny_models import save_tiny_llama

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": "model",
    "tasks": [{"name": name, "files": f"data/{name}"} for name in ("colour", "animal")],
    "recipe": {
        "model": {"dtype": "float32", "load_in_4bit": False},
        "adapter": {"lora_dropout": 0.0},
        "data": {"max_seq_length": 64, "mixture": "uniform", "near_duplicate_threshold": None},
        "parallel": {"zero_stage": 0, "timeout_seconds": 600},
        "train": {"max_steps": 2, "global_batch_size": 4, "per_device_train_batch_size": 4, "logging_steps": 1},
    },
    "budget": {"method": "molora", "tolerance": 0.1},
    "grid": {"factor": 2, "extensions": 1},
    "seeds": {"grid": 1, "compare": [2], "final": [3]},
    "against": ["lora"],
    "methods": [
        {"name": "lora", "rates": [0.001, 0.002], "recipe": {"adapter": {"method": "lora"}}},
        {"name": "molora", "rates": [0.001], "recipe": {"adapter": {"method": "molora", "num_experts": 4, "r": 2}}},
        {"name": "alone", "rates": [0.001], "single_task": True, "recipe": {"adapter": {"method": "lora"}}},
        {"name": "rslora", "rates_of": "lora", "recipe": {"adapter": {"method": "lora", "use_rslora": True}}},
    ],
}


def write_suite(folder: Path, suite: dict[str, Any]) -> Path:
    """Write a suite as a file."""
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def tiny_bench(folder: Path, suite: dict[str, Any] | None = None, *, real_tokenizer: bool = False) -> Bench:
    """Return the prepared suite, whose paths are absolute, with its model and tasks made in `folder`."""
    if not (folder / "data").exists():
        make_tasks(folder / "data")
        # A tokenizer is needed only where something is trained.
        (make_tiny_llama if real_tokenizer else save_tiny_llama)(folder / "model")
    given = TINY if suite is None else suite
    tasks = [task | {"files": str(folder / task["files"])} for task in given["tasks"]]
    written = given | {"model": str(folder / "model"), "tasks": tasks}
    return Bench.open(load_suite(write_suite(folder, written)), folder / "out")


def result(run: Run, accuracy: float | None) -> Result:
    """Return a result with this accuracy on every task, on ten questions; None: the run failed."""
    if accuracy is None:
        return Result(facts_of(run) | {"status": FAILED, "error": "exit code 1", "seconds": {"wall": 1.0, "cpu": 1.0}})
    right = round(10 * accuracy)
    rows = [{"label": 0, "scores": [-1.0, -2.0] if n < right else [-2.0, -1.0], "lengths": [1, 1]} for n in range(10)]
    tasks = {name: {"n": 10, "accuracy": right / 10} for name in run.tasks}
    outcome = {
        "result": {"tasks": tasks, "average": right / 10},
        "questions": dict.fromkeys(run.tasks, rows),
        "step_seconds": 1.0,
        "seconds": {"wall": 4.0, "cpu": 8.0},
    }
    return Result(facts_of(run) | {"status": FINISHED} | outcome)


def results_of(runs: list[Run], accuracy: Callable[[Run], float | None]) -> dict[str, Result]:
    """Return results of runs by id."""
    return {run.id: result(run, accuracy(run)) for run in runs}
