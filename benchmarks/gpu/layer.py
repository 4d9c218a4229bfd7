"""Stage layer: a step of every method on the device against the CPU, the same bits twice, kernels and waits.

The comparisons in fp32 are tests, too (`pytest -m gpu`). Counts of linears and a block stand beside those that
tests/strict/counts.json has for a device without kernels of its own: there an operation is one launch.
"""

import sys
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu import launches
from benchmarks.gpu.measure import DEVICE, GPU, kernels, waits
from benchmarks.gpu.verdicts import Verdicts
from tests.gpu.steps import CASES, KERNEL_CASES, Case, Step, gradient_bound, layer_count, masks, worst_difference

LOSS_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(case: Case, dtype: torch.dtype) -> str:
    """Say how far gradients are from the CPU's, whether a step repeats itself, and what it launches and waits for."""
    here, there = Step(DEVICE, dtype, case), Step(torch.device("cpu"), dtype, _on_cpu(case))
    found, wanted = float(here()), float(there())
    assert abs(found - wanted) <= LOSS_BOUNDS[dtype] * abs(wanted), f"loss {wanted} on the CPU, {found} here"
    worst, name = worst_difference(here.gradients(), there.gradients())
    assert worst < gradient_bound(case, dtype), f"gradient of {name}: {worst:.1e}"
    once = _flat(here)
    here()
    same = torch.equal(once, _flat(here))
    return f"worst gradient {worst:.1e}, the same bits twice: {same}, {counts(here)}"


def counts(step: Step) -> str:
    return f"kernels {kernels(step).number}, host waits {waits(step)}, of {layer_count(step)} adapted linears"


def _on_cpu(case: Case) -> Case:
    return Case(case.method, case.options | {"computation": "grouped"}) if case in KERNEL_CASES else case


def _flat(step: Step) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in step.gradients().values()])


def same_masks() -> str:
    for p, features in ((0.05, 513), (0.5, 64)):
        assert torch.equal(masks(DEVICE, p, features), masks(torch.device("cpu"), p, features))
    return "equal to the CPU's to the bit"


def main() -> int:
    verdicts = Verdicts()
    verdicts.attempt("dropout masks", same_masks)
    for dtype in LOSS_BOUNDS:
        for case in [*CASES, *(KERNEL_CASES if GPU else [])]:
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            verdicts.attempt(name, partial(compare, case, dtype))
    verdicts.log("kernels and waits here, and in brackets those counted without a GPU")
    for case_name, kind in product(launches.CASES, launches.BASES):
        verdicts.attempt(f"{case_name} {kind}:", partial(launches.beside_golden, case_name, kind))
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
