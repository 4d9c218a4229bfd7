"""The demo's model, tasks and recipe in small: a run of two processes, and evaluating it again with one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from malora_dist.recipes import demo
from tests.e2e import ROOT, run_alone, run_ranks
from tests.test_train import records


@pytest.mark.e2e
@pytest.mark.slow("a model of 135 million parameters, trained by two processes and evaluated three times")
def test_a_real_model_on_real_tasks(tmp_path: Path) -> None:
    """The demo's recipe in small: evaluating again with the adapter off gives the base's numbers of the run."""
    demo.prepare_demo(tmp_path / "demo")
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "malora_dist" / "recipes" / "demo.yaml").read_text())
    recipe["model"]["dtype"] = "float32"
    recipe["data"] |= {"tasks": recipe["data"]["tasks"][:2], "cache_dir": "cache"}
    for task in recipe["data"]["tasks"]:
        task |= {"max_train_samples": 20, "max_eval_samples": 4}
    recipe["train"] |= {"max_steps": 2, "global_batch_size": 2, "per_device_train_batch_size": 1}
    recipe["train"] |= {"logging_steps": 1, "save_steps": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_ranks(2, "malora_dist.train", ["recipe.yaml"], tmp_path)
    assert done.code == 0, done.output
    run = tmp_path / "runs" / "demo"
    train = records(run, "train")
    assert len(train) == 2 and all(0 < record["loss"] < 10 and record["peak_memory_gib"] < 3 for record in train)
    assert records(run, "run")[0]["trainable_parameters"] == 19_123_200
    before = json.loads((run / "eval.json").read_text())
    assert before["base"] != before["tuned"]
    done = run_alone(
        "malora_dist.evaluate", ["runs/demo", "--parallel.zero_stage=0", "--evaluation.tuned=false"], tmp_path
    )
    assert done.code == 0, done.output
    after = json.loads((run / "eval-2.json").read_text())
    for name, task in before["base"]["tasks"].items():
        assert after["base"]["tasks"][name] == pytest.approx(task, rel=1e-5), name
