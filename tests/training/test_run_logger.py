"""What a run's folder keeps of the starts before: what belongs to the work that goes on, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.distributed.process_groups import World, wait_for_all
from malora_dist.distributed.rank_errors import sharing_errors
from malora_dist.errors import CheckpointError, TrainingError
from malora_dist.files.atomic import write_json
from malora_dist.files.exit_status import read_exit_status
from malora_dist.files.run_files import MEASURED_ON
from malora_dist.tracking import trackers
from malora_dist.tracking.metrics import MetricsWriter, read_metrics
from malora_dist.training import run_logger
from malora_dist.training.resume import find_resume_point
from malora_dist.training.run_lifecycle import RunLifecycle
from malora_dist.training.run_logger import RunLogger
from tests.multiprocess import run_distributed
from tests.training.test_resume import begun, config

MEASURED = {"tasks": {"a": {"n": 1, "accuracy": 0.9}}, "average": 0.9}


def go_on(world: World, run: str, wanted: str) -> dict[str, Any]:
    """Begin as `malora_dist.train` does, from what is wanted; what is then in the folder."""
    its_config = config(Path(run), resume_from_checkpoint=wanted)
    point = find_resume_point(its_config)
    logger = RunLogger(its_config, Path(run), world)
    if not point.goes_on:
        logger.measured_on({"recipe": {"train.seed": 42}})
    assert point.checkpoint is not None
    logger.resumed(3, Checkpoint.open(point.checkpoint))
    logger.close()
    return {
        "evaluations": logger.evaluations,
        "files": sorted(path.name for path in Path(run).glob("*.json")),
        "records": [
            f"{record['kind']} {record.get('step', '')}" for record in read_metrics(Path(run) / "metrics.jsonl")
        ],
    }


def read_damaged(world: World, run: str) -> list[str]:
    """Meet the damage of each file that a start reads, which is then put right; what is raised."""
    folder, raised = Path(run), []
    for name, content in (
        ("eval.json", '{"base": {"ta'),
        ("eval.json", "[]"),
        (MEASURED_ON, "{"),
        ("baseline.json", "{"),
    ):
        if world.is_main:
            (folder / name).write_text(content)
        wait_for_all()
        try:
            logger = RunLogger(config(folder), folder, world)
            logger.measured_on({"recipe": 1})
            logger.kept("baseline.json", lambda: MEASURED)
        except CheckpointError as error:
            raised.append(str(error))
        wait_for_all()
        if world.is_main:
            write_json(folder / name, {"recipe": 1} if name == MEASURED_ON else {"base": MEASURED})
    return raised


@pytest.mark.distributed
def test_a_damaged_file_of_a_run_is_named_and_costs_no_evaluation(tmp_path: Path) -> None:
    write_json(tmp_path / MEASURED_ON, {"recipe": 1})
    first, second = run_distributed("tests.training.test_run_logger:read_damaged", 2, run=str(tmp_path))
    names = ["eval.json", "eval.json", MEASURED_ON, "baseline.json"]
    assert first == second
    for name, message in zip(names, first, strict=True):
        assert message.startswith(f"{tmp_path / name} is damaged: ")
    assert json.loads((tmp_path / "eval.json").read_text()) == {"base": MEASURED}


def save_an_adapter(world: World, run: str) -> list[bool]:
    """Let each process say whether it was to keep the tensors that all gathered, and whether it wrote them."""
    said: list[bool] = []

    def gathered(model: nn.Module, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
        said.append(keep)
        yield from [("a", torch.ones(1))] if keep else []

    run_logger.gathered_adapter_state = gathered
    run_logger.save_adapter = lambda folder, info, state, card: said.append(list(state) == ["a"])  # type: ignore[assignment]
    RunLogger(config(Path(run)), Path(run), world).adapter(nn.Linear(1, 1), "adapter")
    return said


@pytest.mark.distributed
def test_one_process_alone_holds_the_whole_adapter(tmp_path: Path) -> None:
    assert run_distributed("tests.training.test_run_logger:save_an_adapter", 2, run=str(tmp_path)) == [
        [True, True],
        [False],
    ]


class Recorder:
    """A tracker that keeps how it was closed."""

    def __init__(self, *_: object) -> None:
        self.closed: list[bool] = []

    def log(self, record: object) -> None:
        pass

    def close(self, *, failed: bool = False) -> None:
        self.closed.append(failed)


def fail_in_a_run(world: World, run: str) -> dict[str, Any]:
    """End a run by an error of rank 1 alone; how its tracker was closed, and what exit.json says."""
    tracker = Recorder()
    trackers._TRACKERS = {"tensorboard": lambda *_: tracker}
    try:
        with RunLifecycle(config(Path(run), report_to="tensorboard"), world) as lifecycle:
            lifecycle.open()
            with sharing_errors(world):
                if world.rank == 1:
                    raise ValueError("a bug")
    except (ValueError, TrainingError) as error:
        return {"closed": tracker.closed, "error": repr(error), "exit": read_exit_status(Path(run))}
    return {}


@pytest.mark.distributed
def test_a_run_that_fails_closes_its_trackers(tmp_path: Path) -> None:
    first, second = run_distributed("tests.training.test_run_logger:fail_in_a_run", 2, run=str(tmp_path / "run"))
    assert first["closed"] == [True] and second["closed"] == []
    assert first["exit"]["outcome"] == "failed" and first["exit"]["reason"] == "rank 1: ValueError: a bug"
    assert second["error"] == "ValueError('a bug')"


@pytest.mark.distributed
@pytest.mark.parametrize("own", [True, False])
def test_a_start_from_another_run_keeps_nothing_of_a_start_that_failed(own: bool, tmp_path: Path) -> None:
    """Its numbers are of another recipe, and its steps are none of the checkpoint's."""
    run, other = tmp_path / "run", tmp_path / "other"
    begun(run, (3,) if own else (), "failed")
    begun(other, (3,))
    write_json(run / "eval.json", {"base": MEASURED})
    write_json(run / "baseline.json", MEASURED)
    (run / MEASURED_ON).write_text(json.dumps({"recipe": {"train.seed": 7}}))
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        for record in ({"kind": "run"}, *({"kind": "train", "step": step, "loss": 9.0} for step in (1, 2, 4))):
            metrics.write(record)
    (found,) = run_distributed(
        "tests.training.test_run_logger:go_on", 1, run=str(run), wanted="auto" if own else str(other)
    )
    kept = ["train 1", "train 2", "checkpoint 3"] if own else []
    assert found["records"] == ["run ", *kept, "resume 3"]
    assert found["evaluations"] == ({"base": MEASURED} if own else {})
    assert ("baseline.json" in found["files"]) == ("eval.json" in found["files"]) == own
    assert json.loads((run / MEASURED_ON).read_text()) == {"recipe": {"train.seed": 7 if own else 42}}
