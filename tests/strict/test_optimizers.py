"""Every optimizer on the device: its steps and its state are the CPU's, and it goes on bit by bit from a checkpoint.

bitsandbytes' own kernels for CUDA are not run: its operators compute on the CPU here, between tensors of the device.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from malora_dist.bench.strict.device import StrictDevice
from malora_dist.optimizers.registry import OPTIMIZERS
from malora_dist.optimizers.spec import OptimizerSpec
from tests.multiprocess import run_distributed
from tests.optimizers.runs_workers import CASES, EXPERTS
from tests.training.one_process import reference_run
from tests.training.workers import EPSILON, LEARNING_RATE, make_model

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 3
# Below and above the size from which moments have 8 bits; a stack of matrices.
SHAPES = [(7, 11), (3, 41, 67)]
RUNS: dict[str, dict[str, Any]] = {
    "8bit-zero2": CASES["8bit-zero2"],
    "8bit-zero3-ep2-offload": EXPERTS["8bit-zero3-ep2"] | {"offload": True},
    "adafactor-zero0": CASES["adafactor-zero0"],
}


class Trainee:
    """A parameter on a device, its optimizer, and steps of gradients drawn on the host."""

    def __init__(self, spec: OptimizerSpec, value: Tensor) -> None:
        self.spec, self.parameter = spec, nn.Parameter(value)
        self.optimizer = spec.build([{"params": [self.parameter]}], **SETTINGS)

    def step(self, number: int) -> None:
        gradient = torch.randn(self.parameter.shape, generator=torch.Generator().manual_seed(number))
        self.parameter.grad = gradient.to(self.parameter.device)
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """As a checkpoint has it, but on the parameter's device."""
        found = self.spec.layout.read(self.optimizer.state[self.parameter], 0, self.parameter.numel())
        shapes = self.spec.layout.shapes(tuple(self.parameter.shape))
        return {name: found[name].view(shape).clone() for name, shape in shapes.items()}

    def resumed(self) -> "Trainee":
        other = Trainee(self.spec, self.parameter.detach().clone())
        self.spec.layout.write(other.optimizer, other.parameter, STEPS, self.state())
        return other


def numbers(spec: OptimizerSpec, shape: tuple[int, ...], device: str) -> list[Tensor]:
    """The weights and the state after some steps, and the weights of the same run, resumed, after one more."""
    trainee = Trainee(spec, torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(device))
    for number in range(STEPS):
        trainee.step(number)
    resumed, found = trainee.resumed(), [trainee.parameter.detach().clone(), *trainee.state().values()]
    for each in (trainee, resumed):
        each.step(STEPS)
    assert torch.equal(resumed.parameter, trainee.parameter)
    return [tensor.cpu() for tensor in (*found, resumed.parameter.detach())]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_are_those_of_the_cpu(strict: StrictDevice, name: str, shape: tuple[int, ...]) -> None:
    wanted = numbers(OPTIMIZERS[name], shape, "cpu")
    assert not strict.counts.launches
    found = numbers(OPTIMIZERS[name], shape, "strict")
    assert strict.counts.launches
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimizers")
    make_model(path / "model")
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """What two processes with a GPU each gave for each run."""
    work = {"folder": str(folder / "model"), "output": str(folder), "cases": RUNS, "sources": None}
    found: dict[str, Any] = run_distributed("tests.optimizers.runs_workers:run_cases", 2, device="strict", **work)[0]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_runs_equal_a_naive_loop_and_go_on_bit_by_bit(folder: Path, runs: dict[str, Any], name: str) -> None:
    wanted = naive_losses(str(folder / "model"), name.partition("-")[0])
    assert runs[name]["same"]
    assert runs[name]["losses"] == pytest.approx(wanted, abs=5e-3 if "8bit" in name else 5e-6)


@cache
def naive_losses(model: str, optimizer: str) -> list[float]:
    """Those of one process over whole tensors, on the CPU."""
    case = CASES[f"{optimizer}-zero0"]

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": EPSILON, "weight_decay": 0.01}
        return OPTIMIZERS[case["optim"]].build([{"params": parameters}], **settings)

    losses: list[float] = reference_run(model, case, build)["losses"]
    return losses
