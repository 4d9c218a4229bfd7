"""Steps on two processes with a GPU each: ZeRO 0 to 3, offload, experts spread or not, and steps that fail."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multiprocess import contiguous_only, run_distributed
from tests.strict.workers import STEPS
from tests.training.one_process import reference_run
from tests.training.workers import make_model

CASES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0, "method": "molora", "evaluation_between": True},
    "zero1 ep2": {"zero_stage": 1, "accumulation": 1, "ep_size": 2, "load_in_4bit": True, "computation": "grouped"},
    "zero1 ep2, conflicts of tasks": {"zero_stage": 1, "accumulation": 1, "ep_size": 2, "task_conflict": "project"},
    "zero2 offload": {"zero_stage": 2, "accumulation": 1, "offload": True, "method": "hydralora"},
    "zero3": {"zero_stage": 3, "accumulation": 1, "load_in_4bit": True, "double_quant": True, "method": "dora"},
    "zero3 ep2": {"zero_stage": 3, "ep_size": 2, "gradient_checkpointing": True},
    "zero3 offload ep2": {"zero_stage": 3, "accumulation": 1, "offload": True, "ep_size": 2, "load_in_4bit": True},
}
FAULTS = {"weight": {"fault": "weight", "zero_stage": 3}, "backward": {"fault": "backward", "zero_stage": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("strict")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    work = {"folder": str(folder), "cases": CASES, "faults": FAULTS}
    return run_distributed("tests.strict.workers:find_out", 2, device="strict", **work)


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(CASES))
def test_steps_give_the_numbers_of_the_cpu(folder: Path, ranks: list[dict[str, Any]], name: str) -> None:
    wanted = reference_run(str(folder), CASES[name])
    for results in ranks:
        for key, values in results["steps"][name].items():
            found, expected = torch.tensor(values), torch.tensor(wanted[key][:STEPS])
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.distributed
def test_groups_take_what_nccl_and_gloo_take(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        said = results["refused"]
        assert "must be contiguous" in said["transposed"]
        assert "device type cpu (NCCL)" in said["host"]
        assert "device type strict (gloo, for host tensors)" in said["device over hosts"]
        assert said["right"] == said["host over hosts"] == "sum 12.0"


def test_collectives_of_the_cpu_tests_refuse_what_nccl_refuses() -> None:
    checked = contiguous_only("all_reduce", lambda tensor: "sent")
    assert checked(torch.ones(3, 2)) == "sent"
    with pytest.raises(ValueError, match="all_reduce: Tensors must be contiguous"):
        checked(torch.ones(3, 2).T)


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_number_that_is_not_finite_stops_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    layer = {"weight": "model.layers.1.self_attn.v_proj", "backward": "model.layers.1.mlp.gate_proj"}[name]
    for results in ranks:
        found = results["faults"][name]
        assert layer in found["error"] and "step 3" in found["error"]
        assert found["moved by the good step"] and not found["moved by the bad step"]
