import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from malora_dist.errors import MaloraError
from malora_dist.report.inputs import read_run
from malora_dist.tracking.metrics import LOSS, MetricsWriter, train_loss
from tests.report.run_folder import TASKS, write_run


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "demo"))
    assert run.name == "demo" and run.missing == [] and run.tasks == TASKS
    assert len(run.train) == 20 and len(run.validation) == 4 and run.run["world_size"] == 2
    assert run.routing is not None and run.routing["step"] == 200
    assert run.setting("parallel", "zero_stage") == 3 and run.setting("parallel", "nothing") is None
    steps, values = run.series(train_loss(TASKS[0]))
    assert 0 < len(steps) == len(values) < 20, "a record without the task is left out"


def test_the_facts_are_those_of_the_last_start(tmp_path: Path) -> None:
    """A start that failed may have been of another recipe, on another number of processes."""
    write_run(tmp_path / "demo")
    with MetricsWriter(tmp_path / "demo" / "metrics.jsonl") as metrics:
        metrics.write({"kind": "run", "world_size": 1, "device": "cuda", "trainable_parameters": 200})
    run = read_run(tmp_path / "demo")
    assert (run.run["world_size"], run.run["device"], run.run["trainable_parameters"]) == (1, "cuda", 200)


def test_an_empty_folder_names_what_is_missing(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert run.missing == ["config.yaml", "metrics.jsonl", "eval.json", "data.json", "adapter/adapter_config.json"]
    assert run.tasks == () and run.parameters is None and run.series(LOSS) == ([], [])
    with pytest.raises(MaloraError, match="none is not a folder"):
        read_run(tmp_path / "none")


def test_numbers_that_are_not_finite_are_no_points(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        for step, loss in ((1, 2.0), (2, math.nan), (3, 1.0)):
            metrics.write({"kind": "train", "step": step, "loss": loss})
    run = read_run(tmp_path)
    assert run.series(LOSS) == ([1, 3], [2.0, 1.0]) and run.non_finite_steps == [2]


def test_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(2, 5, 7, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, path, metadata={"format": "pt"})
    assert read_run(tmp_path).parameters == 12 + 70 + 1
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(MaloraError, match="adapter_model.safetensors is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("eval.json", "{"), ("data.json", "[1]"), ("config.yaml", "a: [1"), ("metrics.jsonl", "{}\n")],
)
def test_damage_names_the_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MaloraError, match=rf"{name}.* damaged"):
        read_run(tmp_path)


def test_tasks_of_all_files_in_the_recipes_order(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {tasks: [{name: b}, {name: a}]}")
    (tmp_path / "eval.json").write_text(json.dumps({"base": {"tasks": {"a": {"n": 1}, "c": {"n": 1}}}}))
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        metrics.write({"kind": "train", "step": 1, "train/d/loss": 1.0})
    assert read_run(tmp_path).tasks == ("b", "a", "c", "d")
