"""Suites are read as recipes are: what is wrong is named with line, key, value and rule."""

from pathlib import Path
from typing import Any

import pytest

from malora_dist.bench.quality.suite import load_suite, merged
from malora_dist.errors import ConfigError
from tests.bench.quality.suites import TINY, write_suite
from tests.multiprocess import ROOT

SHIPPED = sorted((ROOT / "benchmarks" / "quality").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites_are_valid(path: Path) -> None:
    suite = load_suite(path)
    assert suite.num_tasks >= 5 and suite.pilot is not None
    assert {"lora", "dora", "molora", "hydralora", "malora", "malora-small"} <= {
        method.name for method in suite.methods
    }


def changed(key: str, value: Any) -> dict[str, Any]:
    return TINY | {key: value}


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (changed("seeds", {"grid": 1, "compare": [1]}), "must be different seeds"),
        (changed("methods", [{"name": "a", "recipe": {}}]), "give either rates or rates_of"),
        (changed("methods", [{"name": "a", "rates": [2e-3, 1e-3]}]), "must be positive and ascending"),
        (changed("methods", [{"name": "a", "rates_of": "b"}]), "a: rates_of=b must be a method with rates"),
        (changed("budget", {"method": "nobody"}), "must name one of the methods, lora, molora, alone, rslora"),
        (changed("against", ["nobody"]), "must name methods"),
        (changed("tasks", [{"name": "nothing"}]), "must be one of csqa,"),
        (changed("pilot", {"keep": 3}), "must keep at most all 2 tasks"),
        (changed("pilot", {"keep": 1}) | {"methods": TINY["methods"][:2]}, "needs a method with single_task"),
        (changed("recipe", {"train": {"seed": 3, "global_batch_size": 2}}), "must not hold train.seed"),
        (changed("recipe", {"train": {"global_batch_size": 3}}), "must be a multiple of 2 tasks"),
        (changed("step", 3), "step=3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, suite: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_suite(write_suite(tmp_path, suite))
    assert message in str(error.value) and "line " in str(error.value)


def test_later_recipes_replace_keys_of_earlier_ones() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}, {"d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2},
        "d": {"e": 5},
    }
