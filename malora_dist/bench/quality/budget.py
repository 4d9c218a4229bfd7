"""Equal trainable parameters: ranks solved for where a method gives none, and every method's number checked."""

from dataclasses import replace
from itertools import count
from typing import Any

from malora_dist.bench.quality.suite import Method, Suite, merged
from malora_dist.config import RunConfig, config_from_dict
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from malora_dist.plan.find_shape import find_shape
from malora_dist.plan.parameters import trainable_parameters
from malora_dist.plan.run import Run, run_of
from malora_dist.plan.shapes import ModelShape

# A task that nothing reads: parameters depend on none.
NO_TASK = {"tasks": [{"name": "any", "train": "any.jsonl"}]}


def within_budget(suite: Suite, model: str) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Fill in the ranks of a suite's methods, and count their trainable parameters.

    A method without `adapter.r` gets the rank that comes nearest to its share of the budget (as `match_budget`).

    Args:
        suite: the suite.
        model: name or path of its base model.

    Returns:
        By name of the method, its keys of a recipe with the rank, and its number of parameters.

    Raises:
        ConfigError: a method's recipe is wrong, or its number is not within the tolerance.
    """
    # Reading the vocabulary of a GGUF file takes seconds.
    budget, shape = suite.budget, find_shape(model)
    target = None if budget is None else _parameters(suite, suite.method(budget.method).recipe, model, shape)
    recipes, numbers = {}, {}
    for method in suite.methods:
        recipe = method.recipe
        if target is not None and method.in_budget and "r" not in recipe.get("adapter", {}):
            recipe = merged(
                recipe, {"adapter": {"r": _rank(suite, method, model, shape, round(method.share * target))}}
            )
        number = _parameters(suite, recipe, model, shape)
        if budget is not None and target is not None and method.in_budget:
            _check(suite, method, number, round(method.share * target), budget.tolerance)
        recipes[method.name], numbers[method.name] = recipe, number
    return recipes, numbers


def _check(suite: Suite, method: Method, number: int, wanted: int, tolerance: float) -> None:
    if abs(number / wanted - 1) > tolerance:
        raise ConfigError(
            f"suite {suite.name}: methods: {method.name} has {number:,} trainable parameters, "
            f"{number / wanted - 1:+.1%} against {wanted:,}; it must be within "
            f"budget.tolerance={tolerance:g} (leave out adapter.r to have it "
            "solved for, change the other numbers, or set in_budget: false)"
        )


def _rank(suite: Suite, method: Method, model: str, shape: ModelShape, wanted: int) -> int:
    """Return the rank whose number of parameters is nearest to `wanted`; of two that are equally near, the smaller.

    As `adapters.parameter_counts.match_budget`, with whatever else the recipe says of its adapter.
    """
    config, run = _run(suite, method.recipe, model, shape)
    below = 0
    for r in count(1):
        adapter = config.adapter.model_copy(update={"r": r})
        spec = adapter_spec(config.model_copy(update={"adapter": adapter}))
        total = trainable_parameters(replace(run, spec=spec))
        if total >= wanted:
            return r - 1 if r > 1 and wanted - below <= total - wanted else r
        below = total
    raise AssertionError("count() ended")


def _run(suite: Suite, recipe: dict[str, Any], model: str, shape: ModelShape) -> tuple[RunConfig, Run]:
    written = merged(suite.recipe, recipe, {"model": {"name_or_path": model}, "data": NO_TASK})
    config = checked_config(written, suite.name)
    return config, run_of(config, adapter_spec(config), shape, 1)


def _parameters(suite: Suite, recipe: dict[str, Any], model: str, shape: ModelShape) -> int:
    return trainable_parameters(_run(suite, recipe, model, shape)[1])


def checked_config(recipe: dict[str, Any], name: str) -> RunConfig:
    """Return a recipe with all its keys. Raises ConfigError with what is wrong in it."""
    return config_from_dict(recipe, source=f"suite {name}: recipe")
