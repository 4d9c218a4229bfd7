"""Expert parallelism x ZeRO x 4-bit x accumulation x recomputation equals one process, on 2 and on 4 ranks.

Compared with the naive loop of `workers.reference_run` over the whole batch: the losses of five steps, the norm before
clipping (which is active), every gradient of every step, the weights after them, and both moments of AdamW. Cases hold
every pair of settings (`pairwise`), and corners by name.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.multiprocess import run_distributed
from tests.pairwise import Case, pairwise
from tests.training.one_process import reference_run
from tests.training.workers import MAX_NORM, make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow("forty topologies, each compared with one process")]

# Equal is equal but for rounding in fp32: the largest gradients are 5e-2, the largest moments 2e-3 and 3e-7.
TOLERANCES = {"gradient": 5e-7, "exp_avg": 2e-8, "exp_avg_sq": 1e-11, "model": 2e-6}
BASES: dict[str, Case] = {
    "fp32": {},
    "nf4": {"load_in_4bit": True},
    "nf4-double": {"load_in_4bit": True, "double_quant": True},
}
# One token a rank in every micro-batch, some without a label.
ONE_TOKEN = [(1, 0), (1, 0), (1, 0), (1, 0), (1, 1), (1, 2), (1, 0), (1, 1)]
CORNERS: dict[int, dict[str, Case]] = {
    2: {
        "nobody visits experts 2 and 3": {"ep_size": 2, "tied_router": True},
        "default persistence threshold": {"ep_size": 2, "default_persistence": True},
        "grouped": {"ep_size": 2, "computation": "grouped", "load_in_4bit": True, "gradient_checkpointing": True},
        "experts without S_A": {"ep_size": 2, "method": "molora"},
        "evaluation between steps": {"ep_size": 2, "evaluation_between": True, "load_in_4bit": True},
        "router on h": {"ep_size": 2, "shape": {"router_input": "h", "scaling_rule": "gate_norm"}},
        "conflicts of tasks": {"ep_size": 2, "task_conflict": "project", "lr_ratios": {"shared_A": 0.5}},
        "z-loss and a schedule": {
            "ep_size": 2,
            "gradient_checkpointing": True,
            "balance": {"schedule": "linear", "last_step": 3, "z_coefficient": 0.2},
        },
        "learning rates": {"ep_size": 2, "lr_ratios": {"gate": 0.25, "P": 2.0, "B": 4.0}},
        "learning rates below 3": {
            "ep_size": 2,
            "zero_stage": 2,
            "lr_ratios": {"shared_A": 0.25, "gate": 0.25, "B": 4.0},
        },
        "top 3 of 8": {"ep_size": 2, "shape": {"num_experts": 8, "top_k": 3}, "normalization": "task"},
    },
    4: {
        "all tokens to one rank": {"ep_size": 4, "tied_router": True, "gradient_checkpointing": True},
        "one token": {"ep_size": 4, "lengths": ONE_TOKEN},
        "one token, all to one rank": {"ep_size": 2, "lengths": ONE_TOKEN, "tied_router": True},
        "evaluation between steps": {"ep_size": 2, "evaluation_between": True},
    },
}


def cases_of(world_size: int) -> dict[str, Case]:
    """All cases of one launch, by name."""
    choices = {
        "ep_size": [ep for ep in (1, 2, 4) if ep <= world_size],
        "zero_stage": [0, 1, 2, 3],
        "base": list(BASES),
        "accumulation": [1, 2],
        "gradient_checkpointing": [False, True],
        "fuse_projections": [True, False],
    }
    cases = {}
    for case in pairwise(choices):
        name = (
            f"ep{case['ep_size']} zero{case['zero_stage']} {case['base']} accumulation{case['accumulation']} "
            f"{'recomputed' if case['gradient_checkpointing'] else 'kept'} "
            f"{'fused' if case['fuse_projections'] else 'apart'}"
        )
        cases[name] = case | BASES[case["base"]]
    return cases | {name: {"zero_stage": 3} | case for name, case in CORNERS[world_size].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("topologies")
    make_model(path / "model")
    return path


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_one_process(folder: Path, world_size: int) -> None:
    output, cases = folder / f"world{world_size}", cases_of(world_size)
    output.mkdir()
    print(f"world {world_size}:", *cases, sep="\n  ")
    ranks = run_distributed(
        "tests.training.workers:train_cases",
        world_size,
        folder=str(folder / "model"),
        output=str(output),
        cases=cases,
    )
    for name, case in cases.items():
        reference = reference_run(str(folder / "model"), case)
        for results in ranks:
            _same_numbers(results[name], reference, name)
            _placed(results[name], case, world_size, name)
        _same_tensors(load_file(output / f"{name}.safetensors"), reference["state"], name)


def _same_numbers(result: dict[str, Any], reference: dict[str, Any], name: str) -> None:
    assert min(reference["grad_norms"]) > MAX_NORM or "one token" in name, f"{name}: clipping is not active"
    for key in ("losses", "aux_losses", "grad_norms"):
        found, wanted = torch.tensor(result[key]), torch.tensor(reference[key])
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6, msg=lambda m, k=key: f"{name} {k}: {m}")


def _same_tensors(found: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    for key, tensor in wanted.items():
        torch.testing.assert_close(
            found[key], tensor, atol=TOLERANCES[key.split(".")[0]], rtol=0, msg=lambda m, k=key: f"{name} {k}: {m}"
        )


def _placed(result: dict[str, Any], case: Case, world_size: int, name: str) -> None:
    """At stage 3 slices of experts are in parts of their data-parallel group, all else in parts of the world."""
    assert set(result["timeouts"]) == {60.0}, name
    parts, sharers = result["parts"], world_size // case["ep_size"] if "ep_size" in case else world_size
    assert (len(parts) == len(result["whole"])) == (case["zero_stage"] == 3), name
    for parameter, part in parts.items():
        expert = case.get("ep_size", 1) > 1 and parameter.endswith((".P", ".A", ".B"))
        assert part == -(-result["whole"][parameter] // (sharers if expert else world_size)), f"{name}: {parameter}"
