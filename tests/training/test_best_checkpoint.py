"""Scores of validations, and which one is the best."""

import json
import math
from pathlib import Path

import pytest

from malora_dist.errors import ConfigError
from malora_dist.training.best_checkpoint import Best, read_baseline, score

TASKS = {"a": {"accuracy": 0.5, "loss": 9.0}, "b": {"accuracy": 0.25, "loss": 0.1}, "c": {"loss": math.log(2)}}


def test_scores() -> None:
    assert score("average", TASKS) == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert score("worst_task", TASKS) == 0.25
    before = {"a": {"accuracy": 0.75}, "b": {"accuracy": 0.1}, "c": {"loss": math.log(4)}, "d": {"accuracy": 1.0}}
    assert score("worst_drop", TASKS, before) == pytest.approx(-0.25)
    assert score("worst_drop", {"b": TASKS["b"]}, before) == pytest.approx(0.15)


def test_the_first_of_equal_scores_stays_the_best() -> None:
    best = Best()
    offers = [(-0.5, 10), (-0.7, 20), (-0.5, 30), (-0.1, 40)]
    assert [best.offer(*offer) for offer in offers] == [True, False, False, True]
    assert best.as_dict() == {"score": -0.1, "step": 40, "by": ""} and Best(**best.as_dict()) == best


def test_a_baseline_is_read_from_an_eval_json(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"base": {"tasks": {"a": {"accuracy": 0.1}}}}))
    assert read_baseline(path, ["a"])["a"]["accuracy"] == 0.1
    path.write_text(json.dumps({"base": {"tasks": {}}, "tuned": {"tasks": {"a": {"accuracy": 0.2}}}}))
    assert read_baseline(path, ["a"])["a"]["accuracy"] == 0.2
    with pytest.raises(ConfigError, match="eval.json has no task 'b'; it has a"):
        read_baseline(path, ["a", "b"])
    for text in ("{", "[]", "{}", '{"base": {"tasks": {"a": {}}}}', '{"base": {"tasks": [1]}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="best_baseline=.*is not an eval.json"):
            read_baseline(path, ["a"])
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_baseline(tmp_path / "none", ["a"])
