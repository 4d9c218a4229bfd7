"""What a suite of `malora bench quality` is: tasks, methods, learning rates and seeds, read from a YAML file.

The recipe of a run is the suite's `recipe`, then its method's, then its learning rate and seed: any key of a recipe can
be compared.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from malora_dist.bench.quality.sources import SOURCES
from malora_dist.config.base import Rule, Section
from malora_dist.config.problems import from_pydantic, raise_all
from malora_dist.config.yaml_reader import read_yaml

NAME = re.compile(r"[a-z0-9][a-z0-9_.+]{0,39}(-[a-z0-9_.+]+)*")
# What a suite gives in keys of its own.
RESERVED: tuple[str, ...] = (
    "output_dir",
    "data.tasks",
    "train.learning_rate",
    "train.seed",
    "model.name_or_path",
    "evaluation.base",
)
RESERVED += ("evaluation.tuned", "evaluation.split", "evaluation.write_scores")


class SuiteTask(Section):
    """A task of the suite."""

    name: str = Field(description=f"One of {', '.join(SOURCES)}.")
    files: str | None = Field(
        None, description="Folder with train.jsonl, validation.jsonl and test.jsonl, in place of a package's task."
    )

    def rules(self) -> Iterator[Rule]:
        if self.files is None and self.name not in SOURCES:
            yield Rule(("name",), f"must be one of {', '.join(SOURCES)}, or have `files`")


class Splits(Section):
    """How the questions of every task are split, by groups of similar ones."""

    seed: int = Field(0, ge=0, description="Seed of the split.")
    train: int = Field(1000, ge=1, description="Training rows of a task, at most.")
    validation: int = Field(150, ge=1, description="Validation rows of a task.")
    test: int = Field(300, ge=1, description="Test rows of a task, at most a quarter of its questions.")


class Pilot(Section):
    """Which of the tasks are learned together: those that move when they are learned alone.

    A task moves if the first single-task method, at its middle rate and with the grid's seed, raises its accuracy on
    validation above the untouched base's by more than noise (the interval of 95 % is above 0), and not beyond
    `highest`, where nothing is left to tell methods apart.
    """

    keep: int = Field(ge=1, description="Tasks kept: the first that move, then those that gained most.")
    highest: float = Field(0.95, gt=0, le=1, description="Accuracy beyond which a task is not kept.")


class Budget(Section):
    """The number of trainable parameters that all methods have."""

    method: str = Field(description="The method whose number it is.")
    tolerance: float = Field(0.01, gt=0, lt=1, description="Largest difference from it, as a share.")


class Method(Section):
    """One method: a name and the keys of a recipe in which it differs."""

    name: str = Field(description="Name in tables and files.")
    recipe: dict[str, Any] = Field({}, description="Its keys of a recipe, which replace those of the suite.")
    rates: tuple[float, ...] = Field((), description="Learning rates to begin with, ascending.")
    rates_of: str | None = Field(None, description="A method whose best learning rate it takes, without a grid.")
    share: float = Field(1.0, gt=0, description="Its number of parameters, as a share of the budget.")
    in_budget: bool = Field(True, description="false: with any number of parameters.")
    single_task: bool = Field(False, description="Train one adapter for each task instead of one for all.")

    def rules(self) -> Iterator[Rule]:
        if not NAME.fullmatch(self.name):
            yield Rule(("name",), "must be small letters, digits, '-', '+', '_' and '.'")
        if bool(self.rates) == (self.rates_of is not None):
            yield Rule(("rates", "rates_of"), "give either rates or rates_of")
        if list(self.rates) != sorted(set(self.rates)) or any(rate <= 0 for rate in self.rates):
            yield Rule(("rates",), "must be positive and ascending")
        for key in RESERVED:
            if _holds(self.recipe, key):
                yield Rule(("recipe",), f"must not hold {key}, which the suite sets")

    @property
    def middle_rate(self) -> float:
        """The learning rate that is tried first."""
        return self.rates[len(self.rates) // 2]


class Grid(Section):
    """How learning rates are searched: factors of `factor` around each method's own, until the best is inside."""

    factor: float = Field(2.0, gt=1, description="Factor between neighbouring learning rates.")
    extensions: int = Field(4, ge=0, description="Rates added at most where the best one is at an edge.")


class Seeds(Section):
    """Seeds of the runs: of adapters and of the order of samples. Every method has the same."""

    grid: int = Field(1, ge=0, description="Seed of the search for learning rates.")
    compare: tuple[int, ...] = Field((), description="Seeds of the comparison on validation.")
    final: tuple[int, ...] = Field((), description="Seeds of the final runs, which are measured on test.")

    def rules(self) -> Iterator[Rule]:
        every = (self.grid, *self.compare, *self.final)
        if len(set(every)) < len(every):
            yield Rule(("final", "compare", "grid"), "grid, compare and final must be different seeds")


class Suite(Section):
    """A suite."""

    name: str = Field(description="Name in tables and files.")
    about: str = Field("", description="One line about it.")
    model: str = Field("smollm2", min_length=1, description="smollm2, the demo's model; or a folder or GGUF file.")
    threads: int = Field(2, ge=1, description="CPU threads of a run.")
    tasks: tuple[SuiteTask, ...] = Field(min_length=1, description="Its tasks.")
    splits: Splits = Field(Splits(), description="How their questions are split.")
    recipe: dict[str, Any] = Field({}, description="Keys of a recipe that all runs share.")
    pilot: Pilot | None = Field(None, description="Which tasks are kept; null: all.")
    budget: Budget | None = Field(None, description="Equal parameters; null: any number.")
    grid: Grid = Field(Grid(), description="The search for learning rates.")
    seeds: Seeds = Field(Seeds(), description="Seeds of the runs.")
    methods: tuple[Method, ...] = Field(min_length=1, description="What is compared.")
    against: tuple[str, ...] = Field((), description="Methods that all others are compared with in tables.")

    def rules(self) -> Iterator[Rule]:
        names = {method.name: method for method in self.methods}
        if not NAME.fullmatch(self.name):
            yield Rule(("name",), "must be small letters, digits, '-', '+', '_' and '.'")
        if len(names) < len(self.methods) or len({task.name for task in self.tasks}) < len(self.tasks):
            yield Rule(("methods", "tasks"), "names must be unique")
        if self.pilot is not None and not any(method.single_task and method.rates for method in self.methods):
            yield Rule(("pilot", "methods"), "needs a method with single_task and rates")
        if self.pilot is not None and self.pilot.keep > len(self.tasks):
            yield Rule(("pilot", "tasks"), f"must keep at most all {len(self.tasks)} tasks")
        if self.budget is not None and self.budget.method not in names:
            yield Rule(("budget", "methods"), f"must name one of the methods, {', '.join(names)}")
        for name in self.against:
            if name not in names:
                yield Rule(("against", "methods"), f"must name methods, of {', '.join(names)}")
        for method in self.methods:
            other = names.get(method.rates_of or method.name)
            if other is None or (method.rates_of is not None and (not other.rates or other.single_task)):
                yield Rule(("methods",), f"{method.name}: rates_of={method.rates_of} must be a method with rates")
        yield from self._recipe_rules()

    def _recipe_rules(self) -> Iterator[Rule]:
        for key in RESERVED:
            if _holds(self.recipe, key):
                yield Rule(("recipe",), f"must not hold {key}, which the suite sets")
        batch = self.recipe.get("train", {}).get("global_batch_size")
        single = any(method.single_task for method in self.methods)
        if single and (not isinstance(batch, int) or batch % self.num_tasks):
            text = f"train.global_batch_size={batch} must be a multiple of {self.num_tasks} tasks"
            yield Rule(("recipe", "pilot", "tasks"), text)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of all tasks."""
        return tuple(task.name for task in self.tasks)

    @property
    def num_tasks(self) -> int:
        """The number of tasks that are learned together."""
        return len(self.tasks) if self.pilot is None else self.pilot.keep

    def method(self, name: str) -> Method:
        """Return the method of this name."""
        return next(method for method in self.methods if method.name == name)


Split = Literal["validation", "test"]


def load_suite(path: str | Path) -> Suite:
    """Read and check a suite. Raises ConfigError with all that is wrong: line, key, value and rule."""
    data, lines = read_yaml(path)
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise_all(from_pydantic(error, data, lines), str(path))
        raise


def merged(*recipes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one; later ones replace the keys of earlier ones."""
    result: dict[str, Any] = {}
    for recipe in recipes:
        for key, value in recipe.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def _holds(recipe: Mapping[str, Any], key: str) -> bool:
    value: Any = recipe
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True
