"""The Triton kernels against the naive per-token twin: on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before triton is first imported, so unless `pytest -m gpu` runs them on a GPU the tests
of this file run in a second pytest, started by `test_all_in_the_interpreter`.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.ops.grouped import grouped_experts
from malora_dist.ops.grouped_triton import BLOCK_T, grouped_backward, grouped_forward, row_blocks
from malora_dist.ops.routing import route
from tests.cases import CASES, DROPOUT_P, AdapterCase, make_inputs, output_gradient
from tests.devices import kernel_device, kernel_mark
from tests.e2e import ROOT, launch, run_alone
from tests.ops import test_operators
from tests.reference import adapter_reference, gradients

DEVICE = kernel_device()
runs_kernels = kernel_mark()
SCALING = 1.5
# Several tiles along every axis: tokens, width in, width out, rank.
WIDE = AdapterCase(T=5, I=300, O=270, E=3, K=2, r=12, D=70)
MANY_ON_ONE = AdapterCase(T=2 * BLOCK_T + 3, I=8, O=6, E=3, K=2, r=3, D=5, routing="one_expert")
HIGH_RANK = AdapterCase(T=7, I=9, O=8, E=2, K=2, r=70, D=80)
EQUAL_CASES = {
    **{("malora", name): CASES[name] for name in ("no-token", "primes", "k1", "fewer-tokens", "more-tokens")},
    **{("malora", name): CASES[name] for name in ("unused-expert", "all-on-one", "all-on-one-k2")},
    ("malora", "many-on-one"): MANY_ON_ONE,
    **{("malora", "wide"): WIDE, ("molora", "wide"): WIDE, ("malora", "high-rank"): HIGH_RANK},
    **{("hydralora", name): CASES[name] for name in ("no-token", "primes")},
    ("hydralora", "high-rank"): HIGH_RANK,
}


def _inputs(case: AdapterCase, method: str, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, Tensor]:
    """Leaves on the device; `parameters` is the dtype of the experts' factors. The router is fp32, as in the layer."""
    dtypes = {"gate": torch.float32, "P": parameters, "A": parameters, "B": parameters}
    tensors = make_inputs(case, method)
    return {
        name: tensor.detach().to(DEVICE, dtypes.get(name, dtype)).requires_grad_(name != "mask")
        for name, tensor in tensors.items()
    }


def _ours(method: str, tensors: dict[str, Tensor], top_k: int) -> Tensor:
    routing = route(tensors["x"], tensors["gate"], len(tensors["B"]) if method == "hydralora" else top_k)
    h = tensors["x"] * tensors["mask"] / (1 - DROPOUT_P)
    h = F.linear(h, tensors["shared_A"]) if "shared_A" in tensors else h
    down = tensors.get("P", tensors.get("A"))
    return grouped_experts(tensors["base"] * 1, h, down, tensors["B"], routing, SCALING, triton=True)


def _check(case: AdapterCase, method: str, tensors: dict[str, Tensor], bound: float) -> None:
    """Output and every gradient within `bound` of the twin, in norm."""
    exact = {
        name: tensor.detach().cpu().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()
    }
    y = _ours(method, tensors, case.K)
    expected = adapter_reference(method, exact, top_k=case.K, scaling=SCALING, dropout_p=DROPOUT_P)
    direction = output_gradient(case, tensors["x"].dtype)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    got = [y, *torch.autograd.grad(y, [tensors[name] for name in names], direction.to(DEVICE))]
    want = [expected, *gradients(expected, [exact[name] for name in names], direction.double())]
    for name, ours, twin in zip(["y", *names], got, want, strict=True):
        assert ours.dtype == tensors.get(name, tensors["x"]).dtype, name
        error, size = (ours.detach().cpu().double() - twin.detach()).norm(), twin.detach().norm()
        assert error <= bound * size, f"{name}: {error / size}"


@runs_kernels
@pytest.mark.parametrize(("method", "name"), EQUAL_CASES)
def test_output_and_every_gradient_equal_the_twin(method: str, name: str) -> None:
    case = EQUAL_CASES[method, name]
    # A softmax that is all but certain of its choice cancels digits in its own gradient, here as in plain torch.
    bound = 1e-4 if case.routing == "one_expert" else 2e-6
    _check(case, method, _inputs(case, method, torch.float32, torch.float32), bound)


@runs_kernels
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_bf16_is_near_exact(parameters: torch.dtype) -> None:
    """A rounding to bf16 errs by up to 2^-9 = 0.2 % on a GPU, 2^-8 in the interpreter, which cuts off; a few follow."""
    _check(CASES["primes"], "malora", _inputs(CASES["primes"], "malora", torch.bfloat16, parameters), bound=0.03)


@runs_kernels
def test_the_same_inputs_give_the_same_bits_without_waiting_for_the_gpu() -> None:
    case = CASES["more-tokens"]
    tensors = _inputs(case, "malora", torch.float32, torch.float32)
    direction = output_gradient(case, torch.float32).to(DEVICE)
    runs = []
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            y = _ours("malora", tensors, case.K)
            leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
            runs.append([y, *torch.autograd.grad(y, leaves, direction)])
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@runs_kernels
def test_strided_inputs_and_gradients() -> None:
    """y transposed, h some columns of a wider tensor; the gradient of y.sum(), one number expanded."""
    generator = torch.Generator().manual_seed(0)
    y_OT, wide_h = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((4, 6), (6, 11)))
    down, B = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((3, 2, 5), (3, 4, 2)))
    gates, ids = torch.rand(6, 3, generator=generator).topk(2)
    gates, ids = gates.to(DEVICE), ids.to(DEVICE)
    ones = torch.ones(1, 1, device=DEVICE).expand(6, 4)
    results = []
    for form in (lambda tensor: tensor, lambda tensor: tensor.contiguous()):
        y, h = form(y_OT.clone().T), form(wide_h[:, 3:8])
        z = grouped_forward(y, h, down, B, gates, ids, SCALING)
        results.append([y, *grouped_backward(form(ones), h, down, B, gates, ids, z, SCALING)])
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous)


@pytest.mark.parametrize("case", [CASES["no-token"], CASES["k-all"], CASES["more-tokens"], MANY_ON_ONE])
def test_blocks_hold_every_token_once_and_with_its_expert(case: AdapterCase) -> None:
    logits_TE = torch.randn(case.T, case.E, generator=torch.Generator().manual_seed(0))
    if case.routing == "one_expert":
        logits_TE[:, -1] += 10
    ids_TK = logits_TE.topk(case.K).indices
    blocks = row_blocks(ids_TK, case.E)
    for k in range(case.K):
        found = []
        for expert, first in zip(blocks.experts_KB[k].tolist(), blocks.firsts_KB[k].tolist(), strict=True):
            if expert < case.E:
                last = min(first + BLOCK_T, int(blocks.starts_KE[k, expert + 1]))
                assert first < last
                found += [(token, expert) for token in blocks.tokens_KT[k, first:last].tolist()]
        assert sorted(found) == list(enumerate(ids_TK[:, k].tolist()))


def test_blocks_need_no_number_of_the_host() -> None:
    """Tensors without data: whoever asked for a value would fail."""
    blocks = row_blocks(torch.empty(200, 2, dtype=torch.int64, device="meta"), 8)
    assert blocks.experts_KB.shape == blocks.firsts_KB.shape == (2, 200 // BLOCK_T + 8)


@pytest.mark.e2e
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the tests above have run")
@pytest.mark.slow("Triton's interpreter runs each program of a kernel in Python")
def test_all_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not interpreter and not compile and not schema"]
    files = [__file__, Path(__file__).with_name("test_operators.py")]
    done = launch([*command, *files], ROOT, TRITON_INTERPRET="1")
    assert done.code == 0 and "skipped" not in done.output, done.output


def compile_for(capability: Sequence[str]) -> None:
    """Everything a layer launches, compiled for a GPU that need not be there. Prints each kernel's shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", int(capability[0]), 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(self.__name__, kernel.metadata.shared)

    driver.set_active(Absent())
    JITFunction.run = compile_only
    E, K, ids_TK = 8, 2, torch.arange(256).view(128, 2) % 8
    for dtype, parameters in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        y, h, gates_TK = torch.zeros(128, 4096, dtype=dtype), torch.zeros(128, 32, dtype=dtype), torch.zeros(128, K)
        down, B = torch.zeros(E, 12, 32, dtype=parameters), torch.zeros(E, 4096, 12, dtype=parameters)
        z = grouped_forward(y, h, down, B, gates_TK, ids_TK, SCALING)
        grouped_backward(y, h, down, B, gates_TK, ids_TK, z, SCALING)
    for dtype in (torch.bfloat16, torch.float32):
        test_operators.launch_all(dtype)


@pytest.mark.e2e
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_fit_the_shared_memory_of_any_gpu(capability: int, tmp_path: Path) -> None:
    cache = str(tmp_path)
    name = "tests.ops.test_grouped_triton:compile_for"
    done = run_alone(name, [str(capability)], ROOT, TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
    assert done.code == 0, done.output
    launches = [line.split() for line in done.output.splitlines()]
    names = Counter(name for name, _ in launches)
    # Of each of the three kinds of numbers: contract, expand (K = 2), and in backward contract, sum, expand, sum.
    grouped = {"contract_rows": 3 * 2, "expand_rows": 3 * 4, "sum_rows": 3 * 2}
    # Of each of two kinds of numbers: one launch an operator.
    operators = {"drop_rows": 4, **dict.fromkeys(("gate_rows", "gate_rows_backward", "choose_rows"), 2)}
    assert names == {**grouped, **operators, "choose_rows_backward": 2}
    assert max(int(shared) for _, shared in launches) <= 64 * 1024
