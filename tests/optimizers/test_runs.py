"""Each optimizer equals a naive loop at each ZeRO stage that it is allowed at, and goes on bit by bit when resumed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.errors import CheckpointError
from malora_dist.optimizers.registry import OPTIMIZERS, optimizer_spec
from tests.multiprocess import run_distributed
from tests.optimizers.made_up import MADE_UP
from tests.optimizers.runs_workers import CASES, EXPERTS
from tests.resume_workers import SAVED
from tests.training.one_process import reference_run
from tests.training.workers import EPSILON, LEARNING_RATE, make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow("every optimizer at every stage, trained, saved and resumed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimizers")
    make_model(path / "model")
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, dict[str, Any]]:
    """What one process and two gave for each case; two also go on from what one has saved."""
    found: dict[int, dict[str, Any]] = {}
    for world in (1, 2):
        (folder / str(world)).mkdir()
        found[world] = run_distributed(
            "tests.optimizers.runs_workers:run_cases",
            world,
            folder=str(folder / "model"),
            output=str(folder / str(world)),
            cases=CASES if world == 1 else CASES | EXPERTS,
            sources=None if world == 1 else str(folder / "1"),
        )[0]
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[str], dict[str, Any]]:
    """The naive loop with the same optimizer over whole tensors, by case."""

    def run(name: str) -> dict[str, Any]:
        with mock.patch.dict(OPTIMIZERS, {MADE_UP.name: MADE_UP}):
            build = optimizer_spec(CASES[name]["optim"]).build

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": EPSILON, "weight_decay": 0.01}
            return build([{"params": parameters}], **settings)

        return reference_run(str(folder / "model"), CASES[name] | {"zero_stage": 0}, optimizer)

    return cache(run)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_naive_loop(
    name: str,
    world_size: int,
    folder: Path,
    runs: dict[int, dict[str, Any]],
    reference: Callable[[str], dict[str, Any]],
) -> None:
    wanted = reference(name.partition("-")[0] + "-zero0")
    weights = load_file(folder / str(world_size) / f"{name}.safetensors")
    initial = wanted["initial"]
    apart = sum((weights[key] - wanted["state"][key]).square().sum() for key in initial)
    way = sum((initial[key] - wanted["state"][key]).square().sum() for key in initial)
    assert (apart / way) ** 0.5 < tolerance_of(name)
    assert runs[world_size][name]["losses"] == pytest.approx(wanted["losses"], abs=5e-3 if "8bit" in name else 2e-6)


def tolerance_of(name: str) -> float:
    """Of the way that the weights have come. Blocks of 8-bit states in flat parts are others than in tensors."""
    return 0.1 if "8bit" in name else 1e-3


@pytest.mark.parametrize(
    ("world_size", "name"), [(world, name) for world in (1, 2) for name in (CASES if world == 1 else CASES | EXPERTS)]
)
def test_goes_on_bit_by_bit(world_size: int, name: str, runs: dict[int, dict[str, Any]]) -> None:
    assert runs[world_size][name]["same"]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_go_on_with_what_one_has_saved(name: str, runs: dict[int, dict[str, Any]]) -> None:
    assert runs[2][name]["apart"] < tolerance_of(name)


def test_a_checkpoint_says_its_optimizer(folder: Path, runs: dict[int, dict[str, Any]]) -> None:
    assert {runs[2][name]["kind"] for name in CASES} == {"adamw_8bit", "adafactor", "made_up"}
    folders = {name: folder / "2" / name / f"step-{SAVED:06d}" for name in CASES}
    names = {name: Checkpoint.open(path).names("optimizer") for name, path in folders.items()}
    states = {name: {tensor.partition(".")[0] for tensor in tensors} for name, tensors in names.items()}
    assert states["8bit-zero3"] == {"exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"}
    assert states["adafactor-zero0"] == {"exp_avg_sq_row", "exp_avg_sq_col"}
    assert states["adafactor_of_vectors-zero0"] == {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"}
    assert states["made_up-zero2"] == {"momentum_buffer"}


def test_state_of_another_shape_is_refused(folder: Path, runs: dict[int, dict[str, Any]]) -> None:
    """Adafactor's tensors under AdamW's name, and moments under Adafactor's."""
    checkpoint = Checkpoint.open(folder / "2" / "adafactor-zero0" / f"step-{SAVED:06d}")
    checkpoint.manifest.state["optimizer"]["kind"] = "AdamW"
    with pytest.raises(CheckpointError, match=r"exp_avg_sq_row\..* must be exp_avg or exp_avg_sq of an adapter tensor"):
        checkpoint._check_tensors()
