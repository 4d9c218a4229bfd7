"""The results of runs: one JSON file each, whole or not there, also of runs that failed."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from malora_dist import __version__
from malora_dist.bench.quality.runs import BASE, Run
from malora_dist.errors import DataError
from malora_dist.files.json_text import parse_json
from malora_dist.tracking.metrics import KIND, RUN, STEP_SECONDS, TRAIN, TRAINABLE_PARAMETERS, read_metrics

FINISHED, FAILED = "finished", "failed"
PACKAGES = ("torch", "transformers", "deepspeed", "numpy")


@dataclass(frozen=True)
class Result:
    """What came out of one run; `record` is its file."""

    record: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run ended well; otherwise `record` holds the error."""
        return bool(self.record["status"] == FINISHED)

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy by task."""
        return {name: row["accuracy"] for name, row in self.record["result"]["tasks"].items()}

    @property
    def average(self) -> float:
        """Mean accuracy over tasks; minus infinity for a run that failed."""
        return float(self.record["result"]["average"]) if self.finished else float("-inf")

    def hits(self, task: str) -> NDArray[np.float64]:
        """Return (N,) ones and zeros: whether each question's most probable choice is the right one."""
        rows = self.record["questions"][task]
        return np.array([float(np.argmax(row["scores"]) == row["label"]) for row in rows])

    def choice_losses(self, task: str) -> NDArray[np.float64]:
        """Return (N,) nats: minus the log-probability of the right choice among the choices."""
        return np.array(
            [np.logaddexp.reduce(row["scores"]) - row["scores"][row["label"]] for row in self.record["questions"][task]]
        )


def read_results(out: Path) -> dict[str, Result]:
    """Read all results under `out`, by the run's id. Raises DataError for a file that is none."""
    results = {}
    for path in sorted((out / "runs").glob("*.json")):
        try:
            record = parse_json(path.read_bytes(), non_finite=True)
            results[record["id"]] = Result(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result of a run: {error!r}") from error
    return results


def facts_of(run: Run) -> dict[str, Any]:
    """Return the facts of the run and of the software that a result records."""
    versions = {"malora_dist": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "id": run.id,
        "suite": run.suite,
        "method": run.method,
        "task": run.task,
        "rate": run.rate,
        "seed": run.seed,
        "split": run.split,
        "stage": run.stage,
        "recipe": run.recipe,
        "rows": run.digests,
        "versions": versions,
    }


def outcome_of(run: Run, folder: Path) -> dict[str, Any]:
    """Collect what a finished run wrote into its folder.

    Returns:
        `trainable_parameters`, `result` (one side of eval.json), `questions` by task, `training_loss` by step, and
        `step_seconds`, the median of a step.

    Raises:
        OSError, ValueError, KeyError, StopIteration: something of it is not there.
    """
    side = BASE if run.method == BASE else "tuned"
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in metrics if record[KIND] == TRAIN]
    questions: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / f"scores-{side}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        questions.setdefault(record["task"], []).append({key: record[key] for key in ("label", "scores", "lengths")})
    return {
        "trainable_parameters": next(record[TRAINABLE_PARAMETERS] for record in metrics if record[KIND] == RUN),
        "result": parse_json((folder / "eval.json").read_bytes())[side],
        "questions": questions,
        "training_loss": {str(record["step"]): record["loss"] for record in steps},
        "step_seconds": float(np.median([record[STEP_SECONDS] for record in steps])),
    }


def of_suite(results: Iterable[Result], suite: str) -> list[Result]:
    """Return the results of one suite."""
    return [result for result in results if result.record["suite"] == suite]
