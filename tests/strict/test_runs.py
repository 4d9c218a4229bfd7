"""Whole runs on two processes with a GPU each: stopped, resumed and evaluated, with the numbers of the CPU's run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from malora_dist.adapters.io.folder import open_adapter
from malora_dist.prepare import main as prepare
from malora_dist.tracking.metrics import read_metrics, without_lost_steps
from tests.e2e import RECIPE, make_folder
from tests.processes import start_ranks, wait

pytestmark = pytest.mark.distributed

TRAIN = {"max_steps": 3, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
STEPS_OF_THE_FIRST = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its base prepared in 4 bits, and few rows to evaluate."""
    path = make_folder(tmp_path_factory.mktemp("runs"))
    for task in path.glob("data/*"):
        for split, rows in (("test", 3), ("validation", 2)):
            lines = (task / f"{split}.jsonl").read_text().splitlines(keepends=True)
            (task / f"{split}.jsonl").write_text("".join(lines[:rows]))
    recipe = {**RECIPE, "train": RECIPE["train"] | TRAIN, "evaluation": {"batch_tokens": 256}}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """The CPU's run, whole, and the device's in two sessions, then evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MALORA_CACHE", str(folder / "prepared"))
        assert prepare(["recipe.yaml"]) == 0
        train(folder, "cpu", "whole")
        train(folder, "strict", "first", "--train.stop_after_steps", str(STEPS_OF_THE_FIRST), code=75)
        train(folder, "strict", "second")
        evaluate = ["--adapter", "runs/strict/adapter", "--recipe", "recipe.yaml"]
        run(folder, "evaluated", "strict", "malora_dist.evaluate", evaluate)
    return {device: folder / "runs" / device for device in ("cpu", "strict")}


def train(folder: Path, device: str, name: str, *settings: str, code: int = 0) -> None:
    words = ["recipe.yaml", "--output_dir", f"runs/{device}", *settings]
    run(folder, name, device, "malora_dist.train", words, code)


def run(folder: Path, name: str, device: str, module: str, words: list[str], code: int = 0) -> None:
    """Two ranks of a command, which must all end with this code."""
    logs = [folder / f"{name}.{rank}.log" for rank in range(2)]
    ranks = start_ranks("tests.strict.session_workers:run", [device, module, words], logs, folder=folder)
    assert wait(ranks) == [code, code], "\n".join(log.read_text() for log in logs)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [dict(each) for each in without_lost_steps(read_metrics(run / "metrics.jsonl")) if each["kind"] == kind]


def test_losses_are_those_of_the_cpu(runs: dict[str, Path]) -> None:
    found, wanted = (records(runs[device], "train") for device in ("strict", "cpu"))
    assert [each["step"] for each in found] == [1, 2, 3]
    for ours, theirs in zip(found, wanted, strict=True):
        for key in ("loss", "aux_loss", "grad_norm", "learning_rate"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_evaluations_are_those_of_the_cpu(runs: dict[str, Path]) -> None:
    found, wanted = (json.loads((runs[device] / "eval.json").read_text()) for device in ("strict", "cpu"))
    again = json.loads((runs["strict"] / "adapter" / "eval.json").read_text())
    for side in ("base", "tuned"):
        for task, values in wanted[side]["tasks"].items():
            assert found[side]["tasks"][task] == pytest.approx(values, rel=1e-3)
            assert again[side]["tasks"][task] == pytest.approx(values, rel=1e-3)


def test_the_adapter_is_that_of_the_cpu(runs: dict[str, Path]) -> None:
    found, wanted = (open_adapter(runs[device]) for device in ("strict", "cpu"))
    for name in wanted.shapes:
        assert (found.read(name) - wanted.read(name)).abs().max() < 1e-3 * wanted.read(name).abs().max(), name
