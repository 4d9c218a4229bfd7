"""The best checkpoint of a run: the score of each validation, and the highest so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.config import TrainConfig
from malora_dist.errors import ConfigError
from malora_dist.files.json_text import parse_json

Tasks = Mapping[str, Mapping[str, float]]


def task_score(record: Mapping[str, float]) -> float:
    """Return a task's accuracy or, where it has none, exp(-loss), the geometric mean of its tokens' probabilities."""
    return record["accuracy"] if "accuracy" in record else math.exp(-record["loss"])


def score(metric: str, tasks: Tasks, baseline: Tasks | None = None) -> float:
    """Return the number by which validations are compared; higher is better.

    Args:
        metric: `average` for the mean of the tasks' scores; `worst_task` for the lowest; `worst_drop` for the lowest
            score less that of `baseline`, negative if a task has become worse.
        tasks: the records of the tasks (`evaluation.scoring.task_result`).
        baseline: records of the same tasks, for `worst_drop`.
    """
    scores = {name: task_score(record) for name, record in tasks.items()}
    if metric == "average":
        return sum(scores.values()) / len(scores)
    if metric == "worst_task":
        return min(scores.values())
    assert metric == "worst_drop" and baseline is not None
    return min(value - task_score(baseline[name]) for name, value in scores.items())


def scored_by(train: TrainConfig) -> str:
    """Return how validations of a run are scored: train.best_metric, and what it compares with."""
    return f"{train.best_metric} {train.best_baseline or ''}".strip()


def read_baseline(path: Path, measured: Sequence[str]) -> Tasks:
    """Read the tasks of an eval.json: of its `tuned` side, else its `base`.

    Raises:
        ConfigError: it is no such file, or lacks a task of those that are `measured`.
    """
    try:
        sides = parse_json(path.read_bytes(), non_finite=True)
        tasks: dict[str, dict[str, float]] = sides["tuned" if "tuned" in sides else "base"]["tasks"]
        for record in tasks.values():
            task_score(record)
    except OSError as error:
        raise ConfigError(f"train.best_baseline={path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"train.best_baseline={path} is not an eval.json: {error!r}") from error
    missing = [name for name in measured if name not in tasks]
    if missing:
        raise ConfigError(f"train.best_baseline={path} has no task {missing[0]!r}; it has {', '.join(sorted(tasks))}")
    return tasks


@dataclass
class Best:
    """The highest score so far and its step; None at first. `by` says how it was scored (`scored_by`)."""

    score: float | None = None
    step: int | None = None
    by: str = ""

    def offer(self, score: float, step: int) -> bool:
        """Compare the score of a step; return whether it is the highest so far. Of equal ones the first stays."""
        if self.score is not None and score <= self.score:
            return False
        self.score, self.step = score, step
        return True

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as a checkpoint's manifest holds them."""
        return {"score": self.score, "step": self.step, "by": self.by}
