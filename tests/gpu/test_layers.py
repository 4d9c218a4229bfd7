"""Adapted models of every method on the GPU: what they start from, and one step, equal the CPU's."""

import pytest
import torch

from malora_dist.adapters.adapted_layers import adapter_parameters
from tests.gpu.steps import CASES, KERNEL_CASES, Case, Step, gradient_bound, worst_difference

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("case", [*CASES, *KERNEL_CASES], ids=lambda case: case.name)
def test_a_step_is_the_cpus(case: Case) -> None:
    """In fp32, where sums alone differ: by their order."""
    here = Step(GPU, torch.float32, case)
    # The kernels of Triton have no CPU form but the grouped one.
    computation = {"computation": "grouped"} if case in KERNEL_CASES else {}
    there = Step(CPU, torch.float32, Case(case.method, case.options | computation))
    started = dict(adapter_parameters(here.model))
    for name, parameter in adapter_parameters(there.model):
        if name.endswith("magnitude"):
            # A norm of the base's weights, summed up on the device.
            torch.testing.assert_close(started[name].cpu(), parameter, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(started[name].cpu(), parameter), f"{name} starts from other values"
    torch.testing.assert_close(here().cpu(), there(), rtol=1e-5, atol=1e-6)
    worst, name = worst_difference(here.gradients(), there.gradients())
    assert worst < gradient_bound(case, torch.float32), f"gradient of {name}: {worst:.1e}"


@pytest.mark.parametrize("case", [CASES[0], CASES[-2]], ids=lambda case: case.name)
def test_bfloat16_is_near(case: Case) -> None:
    here, there = Step(GPU, torch.bfloat16, case), Step(CPU, torch.bfloat16, case)
    torch.testing.assert_close(here().float().cpu(), there().float(), rtol=2e-2, atol=2e-2)
    worst, name = worst_difference(here.gradients(), there.gradients())
    assert worst < gradient_bound(case, torch.bfloat16), f"gradient of {name}: {worst:.1e}"
