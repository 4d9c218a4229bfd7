"""The training loop at world size 1: what is logged when, from which steps, and what a stop leaves unchanged."""

import time
from typing import Any

import numpy as np
import pytest

from malora_dist.data.encode import Sample
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.process_groups import World
from malora_dist.training.loop import Actions, LoopSettings, train_loop
from malora_dist.training.preemption import Preempted, PreemptionCoordinator
from malora_dist.training.training_state import LoopState, TrainingParts
from tests.multiprocess import run_distributed
from tests.training.nonfinite_check_workers import ACCUMULATION, TASKS, new_train_step
from tests.training.workers import make_model

pytestmark = pytest.mark.distributed

STEPS, TASK_SIZES = 6, [9, 5]  # the third task has no samples
PAUSE = 1.0
EVERY: dict[str, Any] = {"logging_steps": 1, "eval_steps": None, "save_steps": None, "stop_after_steps": None}
# By score of each validation: the second is the best, the third equals it.
SCORES = {2: 0.25, 4: 0.5, 6: 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "every": EVERY,
    "windows": {**EVERY, "logging_steps": 4, "eval_steps": 2, "save_steps": 3},
    "stopped": {**EVERY, "stop_after_steps": 3, "save_steps": 3},
    "routing": {**EVERY, "eval_steps": 1},
    "lora": {**EVERY, "eval_steps": 1, "stop_after_steps": 1},
    "hydralora": {**EVERY, "eval_steps": 1, "stop_after_steps": 1},
}


def loader() -> TrainLoader:
    draw = np.random.default_rng(0)
    tasks = np.repeat(np.arange(len(TASK_SIZES)), TASK_SIZES)
    samples = [
        Sample(i, int(task), draw.integers(0, 96, 8 + 3 * (i % 5)).astype(np.int32), 4) for i, task in enumerate(tasks)
    ]
    return TrainLoader(samples, task_sizes=TASK_SIZES, global_batch_size=2 * ACCUMULATION, micro_batch_size=2)


def train_runs(world: World, folder: str) -> dict[str, dict[str, Any]]:
    return {name: train_run(world, folder, name) for name in RUNS}


def train_run(world: World, folder: str, name: str) -> dict[str, Any]:
    method = name if name in ("lora", "hydralora") else "malora"
    train_step = new_train_step(world, folder, {"zero_stage": 2, "method": method}, total_steps=STEPS)
    settings = LoopSettings(max_steps=STEPS, steps_per_epoch=3.5, **RUNS[name])
    records: list[dict[str, Any]] = []
    calls: list[tuple[Any, ...]] = []

    def validate(step: int) -> float:
        calls.append(("validate", step))
        time.sleep(PAUSE if name == "windows" else 0)
        return SCORES.get(step, 0.0)

    def save(state: LoopState, best: bool) -> None:
        calls.append(("save", state.step, best))

    preemption = PreemptionCoordinator(world)
    actions = Actions(log=records.append, validate=validate, save=save)
    ended, began = "whole", time.monotonic()
    try:
        train_loop(
            TrainingParts.of(train_step, loader(), "adamw_torch"), settings, LoopState(), actions, preemption.poll
        )
    except Preempted as stop:
        ended = stop.reason
    seconds = time.monotonic() - began
    return {
        "records": records,
        "calls": calls,
        "steps": train_step.engine.global_steps,
        "ended": ended,
        "seconds": seconds,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("loop")
    make_model(folder)
    (runs,) = run_distributed("tests.training.test_loop:train_runs", 1, folder=str(folder))
    return runs


def of_kind(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [record for record in run["records"] if record["kind"] == kind]


def test_a_record_of_every_step(runs: dict[str, dict[str, Any]]) -> None:
    records = of_kind(runs["every"], "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records] == [pytest.approx(step / 3.5) for step in range(1, 7)]
    # Two steps of warm-up, then down to 0 at the end of the sixth.
    schedule = [0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4]
    assert [record["learning_rate"] for record in records] == [pytest.approx(rate) for rate in schedule]
    names = {"kind", "step", "epoch", "loss", "aux_loss", "grad_norm", "learning_rate", "tokens_per_second",
             "step_seconds", "peak_memory_gib", "train/a/loss", "train/b/loss"}  # fmt: skip
    assert set().union(*records) == names
    assert runs["every"]["steps"] == STEPS and runs["every"]["calls"] == [["save", 6, False]]
    assert all(0.05 < record["peak_memory_gib"] < 8 and record["aux_loss"] > 0.9 for record in records)


def test_a_window_is_the_mean_of_its_steps_and_of_its_tasks_tokens(runs: dict[str, dict[str, Any]]) -> None:
    single = of_kind(runs["every"], "train")
    windows = of_kind(runs["windows"], "train")
    assert [record["step"] for record in windows] == [1, 4, 6]
    tokens, targets = counts("input_ids"), counts("targets")
    for record, steps in zip(windows, ([0], [1, 2, 3], [4, 5]), strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert record[name] == pytest.approx(np.mean([single[i][name] for i in steps]), rel=1e-5), name
        assert record["learning_rate"] == single[steps[-1]]["learning_rate"]
        for task, name in enumerate(("train/a/loss", "train/b/loss")):
            total = sum(single[i].get(name, 0) * targets[i][task] for i in steps)
            assert record[name] == pytest.approx(total / sum(targets[i][task] for i in steps), rel=1e-5)
        seconds = record["step_seconds"] * len(steps)
        assert record["tokens_per_second"] * seconds == pytest.approx(sum(sum(tokens[i]) for i in steps))
    assert len({tuple(step) for step in targets}) > 3  # or a mean of means would pass


def counts(what: str) -> list[list[int]]:
    """Each task's tokens of every step: all `input_ids`, or the `targets` only."""
    batches, found = loader(), []
    for _ in range(STEPS):
        samples = [b.task_ids[b.target_sample if what == "targets" else b.token_sample] for b in next(batches)]
        found.append(np.bincount(np.concatenate(samples), minlength=len(TASKS)).tolist())
    return found


def test_validation_and_saves_come_at_their_steps_and_do_not_count_as_training(runs: dict[str, dict[str, Any]]) -> None:
    run = runs["windows"]
    # A validation that is the best so far is saved beside the saves that are due, and so is the last step.
    assert run["calls"] == [["validate", 2], ["save", 2, True], ["save", 3, False], ["validate", 4], ["save", 4, True],
                            ["validate", 6], ["save", 6, False]]  # fmt: skip
    assert run["ended"] == "whole"
    training = sum(
        record["step_seconds"] * steps for record, steps in zip(of_kind(run, "train"), (1, 3, 2), strict=True)
    )
    assert training <= run["seconds"] - len(SCORES) * PAUSE


def test_routing_shares_add_up(runs: dict[str, dict[str, Any]]) -> None:
    assert [record["step"] for record in of_kind(runs["every"], "routing")] == [6]
    records = of_kind(runs["windows"], "routing")
    assert [record["step"] for record in records] == [2, 4, 6]
    for record in records:
        assert record["tasks"] == list(record["share"]) == TASKS
        assert all(len(layers) == 12 for layers in record["share"].values())
        for task, total in {"a": 1, "b": 1, "c": 0}.items():
            for layer, shares in record["share"][task].items():
                assert len(shares) == 4 and layer.startswith("model.layers.")
                assert sum(shares) == pytest.approx(total, abs=1e-6), (task, layer)
    # Each record counts the steps since the one before it, weighted by the task's tokens.
    single, tokens = of_kind(runs["routing"], "routing"), counts("input_ids")
    for record, steps in zip(records, ([0, 1], [2, 3], [4, 5]), strict=True):
        for task, name in enumerate("ab"):
            for layer, shares in record["share"][name].items():
                sums = sum(tokens[i][task] * np.array(single[i]["share"][name][layer]) for i in steps)
                assert shares == pytest.approx(sums / sum(tokens[i][task] for i in steps), abs=1e-6), (name, layer)


def test_a_stop_leaves_schedule_and_steps_as_they_are(runs: dict[str, dict[str, Any]]) -> None:
    stopped, whole = of_kind(runs["stopped"], "train"), of_kind(runs["every"], "train")[:3]
    assert runs["stopped"]["steps"] == 3 and runs["stopped"]["ended"] == "train.stop_after_steps is reached"
    # Once because it is due, once more to be sure; the second finds the first.
    assert runs["stopped"]["calls"] == [["save", 3, False], ["save", 3, False]]
    for name in ("step", "epoch", "loss", "aux_loss", "grad_norm", "learning_rate", "train/a/loss"):
        assert [record.get(name) for record in stopped] == pytest.approx([record.get(name) for record in whole]), name
    assert of_kind(runs["stopped"], "routing") == []


@pytest.mark.parametrize("method", ["lora", "hydralora"])
def test_without_a_choice_of_experts_there_is_nothing_to_share(method: str, runs: dict[str, dict[str, Any]]) -> None:
    (record,) = of_kind(runs[method], "train")
    assert record["aux_loss"] == 0 and record["loss"] > 0
    assert of_kind(runs[method], "routing")[0]["share"] == {"a": {}, "b": {}, "c": {}}
