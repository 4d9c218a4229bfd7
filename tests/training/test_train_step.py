"""A step on DeepSpeed equals a naive one-process loop in losses, clip norm and weights: ZeRO 0-3, 1 and 2 ranks."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from malora_dist.ops.loss import sum_by_group
from tests.multiprocess import run_distributed
from tests.training.one_process import reference_run
from tests.training.workers import STEPS, make_model, step_samples

CASES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3-nf4-checkpointing": {
        "zero_stage": 3,
        "load_in_4bit": True,
        "double_quant": True,
        "gradient_checkpointing": True,
    },
    "zero3-sample": {"zero_stage": 3, "normalization": "sample"},
    "zero2-task": {"zero_stage": 2, "normalization": "task"},
    "zero3-lora": {"zero_stage": 3, "method": "lora"},
    "zero1-molora": {"zero_stage": 1, "method": "molora"},
    "zero0-dora": {"zero_stage": 0, "method": "dora"},
    "zero2-dora": {"zero_stage": 2, "method": "dora", "load_in_4bit": True},
    "zero3-dora": {"zero_stage": 3, "method": "dora", "load_in_4bit": True, "gradient_checkpointing": True},
    "zero3-hydralora": {"zero_stage": 3, "method": "hydralora"},
    **{f"zero{stage}-rates": {"zero_stage": stage, "lr_ratios": {"gate": 0.25, "B": 4.0}} for stage in range(4)},
    "zero1-rates-lora": {"zero_stage": 1, "method": "lora", "lr_ratios": {"A": 0.5, "B": 8.0}},
    **{f"zero{stage}-conflict": {"zero_stage": stage, "task_conflict": "project"} for stage in range(3)},
    "zero3-conflict": {
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "fuse_projections": False,
        "dropout": 0.0,
        "task_conflict": "project",
    },
    "zero3-until": {"zero_stage": 3, "balance": {"schedule": "until", "last_step": 3}},
    "zero2-linear-z": {"zero_stage": 2, "balance": {"schedule": "linear", "last_step": 4, "z_coefficient": 0.2}},
    "zero3-z": {
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "fuse_projections": False,
        "balance": {"z_coefficient": 0.2},
    },
    "zero1-router-h": {"zero_stage": 1, "shape": {"router_input": "h", "scaling_rule": "gate_norm"}},
    "zero3-router-h": {
        "zero_stage": 3,
        "load_in_4bit": True,
        "gradient_checkpointing": True,
        "method": "hydralora",
        "shape": {"router_input": "h", "scaling_rule": "gate_sum"},
    },
    "zero3-router-bf16-base": {
        "zero_stage": 3,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "shape": {"router_input": "h", "router_dtype": "input"},
    },
    "zero0-fused": {"zero_stage": 0, "gradient_checkpointing": True},
    "zero3-fused": {"zero_stage": 3, "load_in_4bit": True, "gradient_checkpointing": True},
    "zero3-apart": {"zero_stage": 3, "fuse_projections": False, "gradient_checkpointing": True},
    "zero0-bf16-base": {"zero_stage": 0, "dtype": "bfloat16"},
    "zero1-bf16-base": {"zero_stage": 1, "dtype": "bfloat16", "fuse_projections": False},
    "zero2-bf16-base": {"zero_stage": 2, "dtype": "bfloat16", "method": "molora", "computation": "grouped"},
    "zero3-bf16-base": {"zero_stage": 3, "dtype": "bfloat16", "load_in_4bit": True, "gradient_checkpointing": True},
}
# The whole step's balance loss, however its samples are dealt: 8 of them at once, or one at a time.
CASES |= {
    f"zero{stage}-{accumulation}-micro-batches": {"zero_stage": stage, "accumulation": accumulation}
    for stage, accumulation in ((0, 1), (1, 4), (2, 1), (3, 4))
}
# A bf16 base whose products round the weights each anew.
NO_COPIES = {f"{name}-no-copies": case | {"no_copies": True} for name, case in CASES.items() if "bf16" in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step")
    make_model(path / "model")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[str], dict[str, Any]]:
    """What one process gives for a case, by its name; made when it is asked for."""
    return cache(lambda name: reference_run(str(folder / "model"), CASES[name]))


@pytest.mark.distributed
@pytest.mark.slow("two dozen cases in one launch, each compared with a naive loop")
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_one_process(folder: Path, reference: Callable[[str], dict[str, Any]], world_size: int) -> None:
    output = folder / f"world{world_size}"
    output.mkdir()
    ranks = run_distributed(
        "tests.training.workers:train_cases",
        world_size,
        folder=str(folder / "model"),
        output=str(output),
        cases=CASES | NO_COPIES,
    )
    for name in NO_COPIES:
        _kept_copies_change_no_bit(output, name.removesuffix("-no-copies"), ranks)
    for name, case in CASES.items():
        for results in ranks:
            _equals(results[name], reference(name), name)
            assert set(results[name]["timeouts"]) == {60.0}
            _is_partitioned(results[name], case, world_size)
        weights = load_file(output / f"{name}.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        if case.get("dtype") == "bfloat16":
            continue
        for key, tensor in reference(name)["state"].items():
            torch.testing.assert_close(
                weights[key], tensor, atol=2e-5, rtol=0, msg=lambda m, k=key, n=name: f"{n} {k} {m}"
            )


def _kept_copies_change_no_bit(output: Path, name: str, ranks: list[dict[str, Any]]) -> None:
    """Weights rounded once a step are the weights of that step: losses, gradients and new weights are the same."""
    for results in ranks:
        for key in ("losses", "aux_losses", "grad_norms"):
            assert results[name][key] == results[f"{name}-no-copies"][key], f"{name} {key}"
    kept, anew = (load_file(output / f"{each}.safetensors") for each in (name, f"{name}-no-copies"))
    assert kept.keys() == anew.keys()
    assert all(torch.equal(tensor, anew[key]) for key, tensor in kept.items()), name


def _equals(result: dict[str, Any], reference: dict[str, Any], name: str) -> None:
    """To rounding in fp32. A bf16 base rounds packed and single samples differently: there to about two bf16 digits."""
    exact = {"losses": 2e-6, "aux_losses": 2e-6, "grad_norms": 2e-5}
    rounded = {"losses": 2e-2, "aux_losses": 2e-2, "grad_norms": 6e-2}
    for key, tolerance in (rounded if "bf16" in name else exact).items():
        found, wanted = torch.tensor(result[key]), torch.tensor(reference[key])
        torch.testing.assert_close(
            found, wanted, atol=tolerance, rtol=tolerance, msg=lambda m, k=key: f"{name} {k}: {m}"
        )


def _is_partitioned(result: dict[str, Any], case: dict[str, Any], world_size: int) -> None:
    """At stage 3 every parameter, base and adapter, is held in parts of 1/world; below, none is."""
    parts = result["parts"]
    assert (len(parts) == len(result["whole"])) == (case["zero_stage"] == 3)
    for parameter, part in parts.items():
        assert part == -(-result["whole"][parameter] // world_size), parameter


@pytest.mark.parametrize("N", [0, 1, 37])
def test_sums_by_group_equal_a_loop(N: int) -> None:
    values = torch.randn(N, generator=torch.Generator().manual_seed(N))
    groups = (torch.arange(N) * 7) % 3  # of four groups, which leaves one without a value
    if N:
        values[0] = torch.inf
    wanted = [sum(float(v) for v, g in zip(values, groups, strict=True) if g == group) for group in range(4)]
    torch.testing.assert_close(sum_by_group(values, groups, 4), torch.tensor(wanted, dtype=torch.float64))
    # Tensors of the meta device hold no numbers: an operation for which the host would have to wait raises.
    assert sum_by_group(values.to("meta"), groups.to("meta"), 4).dtype == torch.float64


def test_mean_of_means_is_another_number(reference: Callable[[str], dict[str, Any]]) -> None:
    """What the naive distributed mean would have given differs far beyond the tolerance above."""
    wanted = reference("zero0")["losses"][0]
    samples = step_samples(1)
    assert len({len(s.input_ids) - s.prompt_length for s in samples}) > 3
    by_sample = reference("zero3-sample")["losses"][0]
    assert abs(wanted - by_sample) > 1e-2
    assert STEPS == 5
