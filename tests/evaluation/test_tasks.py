"""Evaluating on two real processes gives what one process without DeepSpeed finds, of the adapter and of its base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.data.encode import ChoiceItem, Sample
from malora_dist.data.packed_row import PackedRow, Packing
from malora_dist.distributed.process_groups import World
from malora_dist.evaluation.scoring import score_items, scores_of_questions, summarise, task_result
from malora_dist.evaluation.tasks import TaskEvaluator
from malora_dist.training.deepspeed_engine import build_engine
from tests.multiprocess import run_distributed
from tests.training.nonfinite_check_workers import deepspeed_settings
from tests.training.workers import build_model, make_model

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "zero3": {"zero_stage": 3},
    "zero3-nf4": {"zero_stage": 3, "load_in_4bit": True},
    "zero2": {"zero_stage": 2},
}
# Questions of each task, and tokens a row: what two ranks cannot share equally, one row for both, a row a question.
SIZES: dict[str, tuple[dict[str, int], int]] = {
    "uneven": ({"a": 5, "text": 3, "empty": 0, "b": 7}, 40),
    "one": ({"a": 1}, 4096),
    "apart": ({"b": 3, "text": 2}, 1),
}
# Where prompts are not shared.
PACKING = {"uneven": Packing.ALONE, "one": Packing.SEQUENCES, "apart": Packing.SEQUENCES}


def questions(sizes: dict[str, int]) -> dict[str, Sequence[ChoiceItem] | Sequence[Sample]]:
    draw = np.random.default_rng(len(sizes))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 96, length).tolist())

    def item() -> ChoiceItem:
        choices = tuple(ids(n) for n in draw.integers(1, 5, draw.integers(2, 5)))
        return ChoiceItem(0, ids(draw.integers(1, 15)), choices, tuple(map(len, choices)), int(draw.integers(2)))

    return {
        task: [Sample(i, 1, np.asarray(ids(9 + i), dtype=np.int32), 4) if task == "text" else item() for i in range(n)]
        for task, n in sizes.items()
    }


def trained(model: nn.Module) -> nn.Module:
    for index, (name, parameter) in enumerate(adapter_parameters(model)):
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
    return model


def evaluate_cases(world: World, folder: str) -> dict[str, dict[str, Any]]:
    """All evaluations of all cases on this rank, the tuned ones twice with one of the base in between."""
    found = {}
    for case in CASES:
        stage, settings = CASES[case]["zero_stage"], deepspeed_settings(CASES[case]["zero_stage"])
        model = trained(build_model(folder, CASES[case] | {"whole_adapters": True}, world, settings))
        engine = build_engine(model, settings, None, zero_stage=stage, timeout_seconds=60)
        for training in (True, False):
            engine.train(training)
            for name, (sizes, batch_tokens) in SIZES.items():
                packing = Packing.TREES if training else PACKING[name]
                evaluator = TaskEvaluator(engine, world, batch_tokens, packing)
                sides = [
                    evaluator.evaluate(questions(sizes), name, use_adapter=use_adapter)
                    for use_adapter in (True, False, True)
                ]
                on = [layer.adapter_enabled for _, layer in mixture_layers(engine.module)]
                restored = all(on) and all(module.training == training for module in engine.module.modules())
                found[f"{case} {name} {training}"] = {"sides": sides, "restored": restored}
    return found


def expected(model: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """The same numbers from a model in this process, one choice a row."""

    def forward(row: PackedRow) -> Tensor:
        output = model(row.input_ids, position_ids=row.position_ids, use_cache=False, logits_to_keep=row.target_index)
        return F.cross_entropy(output.logits[0], row.targets, reduction="none").detach()

    results = {}
    for task, rows in questions(sizes).items():
        if task == "text":
            texts = [tuple(row.input_ids.tolist()) for row in rows]
            rows = [ChoiceItem(1, ids[:4], (ids[4:],), (1,), 0) for ids in texts]
        found = score_items(forward, rows, batch_tokens=1, packing=Packing.ALONE)
        if rows:
            results[task] = task_result(rows, scores_of_questions(rows, found))
    return summarise(results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_distributed("tests.evaluation.test_tasks:evaluate_cases", 2, folder=str(folder))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_find_what_one_process_finds(folder: Path, ranks: list[dict[str, Any]], case: str) -> None:
    model = trained(build_model(str(folder), CASES[case], None, {})).eval()
    for name, (sizes, _) in SIZES.items():
        for _, layer in mixture_layers(model):
            layer.adapter_enabled = True
        tuned = expected(model, sizes)
        for _, layer in mixture_layers(model):
            layer.adapter_enabled = False
        base = expected(model, sizes)
        for training in (True, False):
            main, other = (rank[f"{case} {name} {training}"] for rank in ranks)
            assert main == other
            assert main["restored"]
            for found, wanted in zip(main["sides"], (tuned, base, tuned), strict=True):
                assert_equal(found, wanted)
        losses = [abs(tuned["tasks"][task]["loss"] - base["tasks"][task]["loss"]) for task in tuned["tasks"]]
        assert min(losses) > 1e-3


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["average"] == (None if wanted["average"] is None else pytest.approx(wanted["average"]))
    assert list(found["tasks"]) == list(wanted["tasks"])
    for task, record in wanted["tasks"].items():
        assert found["tasks"][task] == pytest.approx(record, rel=1e-5), task
