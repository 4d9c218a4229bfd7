"""The runs of a suite: each a method, a learning rate and a seed, with an identity made of what it computes."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.bench.quality.budget import checked_config, within_budget
from malora_dist.bench.quality.prepare import PreparedTask, prepare_model, prepare_tasks
from malora_dist.bench.quality.suite import Method, Split, Suite, merged
from malora_dist.config import RunConfig

# Steps of the run that measures the untouched base and, beside it, what a step costs.
BASE_STEPS = 4
BASE = "base"


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    method: its name, or `base` for the untouched model. task: the only one it learns; None: all that are kept.
    recipe: what was written for it in the suite, without paths; it decides the numbers with `digests`, those of the
    rows. stage: why it is made.
    """

    suite: str
    method: str
    task: str | None
    rate: float
    seed: int
    split: Split
    stage: str
    tasks: tuple[str, ...]
    recipe: dict[str, Any]
    digests: dict[str, dict[str, str]]

    @property
    def id(self) -> str:
        """Name of its file and folder: readable, and different for whatever gives other numbers."""
        decides = {"recipe": self.recipe, "rows": self.digests, "split": self.split, "method": self.method == BASE}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
        parts = [self.suite, self.method, *([self.task] if self.task else []), f"lr{self.rate:g}", f"s{self.seed}"]
        return "_".join([*parts, *(["test"] if self.split == "test" else []), digest])


class Bench:
    """A suite with its prepared tasks and solved ranks: what runs are made from."""

    def __init__(
        self, suite: Suite, out: Path, tasks: dict[str, PreparedTask], model: str, recipes: dict[str, dict[str, Any]],
        parameters: dict[str, int],
    ) -> None:  # fmt: skip
        self.suite, self.out, self.tasks, self.model = suite, out, tasks, model
        self.recipes, self.parameters = recipes, parameters

    @classmethod
    def open(cls, suite: Suite, out: Path, *, with_test: bool = False, say: Any = lambda text: None) -> "Bench":
        """Prepare a suite's tasks and model, and check all its recipes. Raises ConfigError or DataError."""
        model = prepare_model(suite, out.absolute())
        recipes, parameters = within_budget(suite, model)
        tasks = prepare_tasks(suite, out, with_test=with_test, say=say)
        return cls(suite, out, tasks, model, recipes, parameters)

    def base_run(self) -> Run:
        """Return the run that measures the untouched base on all tasks, and the cost of steps and scoring."""
        budget = self.suite.budget
        first = next(method for method in self.suite.methods if not method.single_task)
        method = first if budget is None else self.suite.method(budget.method)
        rate = method.rates[0] if method.rates else self.suite.method(method.rates_of or "").rates[0]
        steps = {"train": {"max_steps": BASE_STEPS, "logging_steps": 1}, "evaluation": {"base": True, "tuned": False}}
        seed, names = self.suite.seeds.grid, self.suite.task_names
        return self._run(BASE, self.recipes[method.name], rate, seed, names, BASE, steps)

    def runs(
        self, method: Method, tasks: tuple[str, ...], rate: float, seed: int, stage: str, split: Split = "validation"
    ) -> list[Run]:
        """Return a method's run on tasks at a learning rate and seed, or of a single-task method one for each task."""
        recipe = self.recipes[method.name]
        if not method.single_task:
            return [self._run(method.name, recipe, rate, seed, tasks, stage, {}, split=split)]
        # As many of the task's samples in each step as in that of all tasks, on average.
        batch = self.suite.recipe["train"]["global_batch_size"] // self.suite.num_tasks
        size = {"train": {"global_batch_size": batch, "per_device_train_batch_size": batch}}
        return [
            self._run(method.name, recipe, rate, seed, (name,), stage, size, split=split, task=name) for name in tasks
        ]

    def _run(
        self, method: str, recipe: dict[str, Any], rate: float, seed: int, tasks: tuple[str, ...], stage: str,
        more: dict[str, Any], *, split: Split = "validation", task: str | None = None,
    ) -> Run:  # fmt: skip
        decides = {
            "model": {"name_or_path": self.suite.model},
            "train": {"learning_rate": rate, "seed": seed},
            "evaluation": {"base": False, "write_scores": True, "split": split},
        }
        digests = {name: {part: self.tasks[name].digests[part] for part in ("train", split)} for name in tasks}
        written = merged(self.suite.recipe, recipe, decides, more)
        return Run(self.suite.name, method, task, rate, seed, split, stage, tasks, written, digests)

    def config(self, run: Run, folder: Path) -> RunConfig:
        """Return the recipe of a run in `folder`, with all keys and paths."""
        tasks = [
            {"name": name, "train": self.tasks[name].file("train"), run.split: self.tasks[name].file(run.split)}
            for name in run.tasks
        ]
        places = {
            "model": {"name_or_path": self.model},
            "data": {"tasks": tasks, "cache_dir": str(self.out.absolute() / "cache")},
            "output_dir": str(folder),
        }
        return checked_config(merged(run.recipe, places), self.suite.name)
