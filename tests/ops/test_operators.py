"""Every operator against a naive twin: in plain PyTorch here; its Triton kernel on a GPU or in Triton's interpreter.

`test_grouped_triton.py` runs this file again in the interpreter, and compiles the kernels.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from malora_dist.ops.devices import triton_ready
from malora_dist.ops.dropout import add_dropped_, drop, dropout_mask, token_keys
from malora_dist.ops.gating import gate_ranks, gate_ranks_backward_
from malora_dist.ops.routing import choose_experts, choose_experts_backward
from tests.devices import kernel_device
from tests.reference import routing_reference

DEVICE = torch.device(kernel_device())
KERNELS = triton_ready(DEVICE)
# On a GPU `pytest -m gpu` runs them too.
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SALT, SCALING = 2**31 - 5, 1.5


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def _keys(T: int) -> Tensor:
    tokens = torch.arange(T, device=DEVICE)
    return token_keys(3, 7, tokens // 4, tokens % 4)


def _close(got: Tensor, want: Tensor, *, roundings: int = 0) -> None:
    """Equal in shape and dtype, and up to some roundings; Triton's interpreter cuts bf16 off where a GPU rounds."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=roundings * 2 * eps, atol=roundings * 2 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "I", "p"), [(0, 8, 0.5), (1, 1, 0.5), (37, 300, 0.25), (5, 513, 0.05), (64, 64, 0.9)])
def test_drop_is_the_mask_to_the_bit(T: int, I: int, p: float, dtype: torch.dtype) -> None:  # noqa: E741
    wide = _random(T, I + 3, dtype=dtype)
    if wide.numel() > 4:
        wide[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), float("nan")])
    keys, nothing = _keys(T), wide.new_zeros(())
    for x in (wide[:, :I].contiguous(), wide[:, 2 : I + 2], wide[:, :I].T.contiguous().T):
        wanted = torch.where(dropout_mask(keys, SALT, I, p).bool(), x, nothing)
        torch.testing.assert_close(drop(x, keys, SALT, p), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "I"), [(0, 8), (1, 1), (37, 300)])
def test_add_dropped_adds_in_place(T: int, I: int, dtype: torch.dtype) -> None:  # noqa: E741
    x, total, keys = _random(T, I, dtype=dtype), _random(T, I, dtype=dtype, seed=1), _keys(T)
    wanted = total + torch.where(dropout_mask(keys, SALT, I, 0.25).bool(), x, x.new_zeros(()))
    add_dropped_(total, x, keys, SALT, 0.25)
    _close(total, wanted, roundings=1 if dtype == torch.bfloat16 else 0)


GATINGS = [(0, 4, 3), (1, 1, 1), (5, 3, 12), (33, 8, 12), (7, 64, 5), (3, 2, 300)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "R"), GATINGS)
def test_gates_weigh_the_ranks_of_their_expert(T: int, E: int, R: int, dtype: torch.dtype) -> None:
    gate_dtype = torch.promote_types(dtype, torch.float32)
    z, grad = _random(T, E * R, dtype=dtype), _random(T, E * R, dtype=dtype, seed=1)
    gates = _random(T, E, dtype=gate_dtype, seed=2).relu()
    weights = (gates * SCALING).to(dtype)[:, :, None]
    product_TN = (z.view(T, E, R) * weights).view(T, E * R)
    _close(gate_ranks(z, gates, SCALING), product_TN, roundings=1)
    grad_z = (grad.view(T, E, R) * weights).view(T, E * R)
    sums = (grad.view(T, E, R).to(gate_dtype) * z.view(T, E, R).to(gate_dtype)).sum(dim=2) * SCALING
    again, grad_gates = gate_ranks_backward_(grad, z, gates, SCALING)
    _close(again, product_TN, roundings=1)
    _close(grad, grad_z, roundings=1)
    torch.testing.assert_close(grad_gates, sums, rtol=1e-5, atol=1e-4)


def test_gates_of_some_columns_of_a_wider_z() -> None:
    wide, gates = _random(9, 20), _random(9, 3, seed=1)
    strided, whole = wide[:, 4:19], wide[:, 4:19].contiguous()
    _close(gate_ranks(strided, gates, SCALING), gate_ranks(whole, gates, SCALING))


CHOICES = [(0, 4, 2), (1, 1, 1), (17, 5, 5), (33, 8, 2), (3, 65, 4), (9, 64, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("T", "E", "K"), CHOICES)
def test_choice_and_its_gradient(T: int, E: int, K: int, normalize: bool, dtype: torch.dtype) -> None:
    logits = _random(T, E, dtype=dtype).cpu().requires_grad_()
    chosen, ids, probs = routing_reference(logits, torch.eye(E, dtype=dtype), K, normalize)
    gates = torch.zeros_like(probs).scatter(1, ids, chosen)
    ours = [out.cpu() for out in choose_experts(logits.detach().to(DEVICE), K, normalize)]
    assert torch.equal(ours[1], ids)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ours[0], gates.detach(), **close)
    torch.testing.assert_close(ours[2], probs.detach(), **close)
    grads = _random(T, E, dtype=dtype, seed=1), _random(T, E, dtype=dtype, seed=2)
    kept = probs.detach().to(DEVICE), ids.to(DEVICE)
    for used in ((True, True), (True, False), (False, True)):
        given = [grad if use else None for grad, use in zip(grads, used, strict=True)]
        total = sum(
            (out * grad.cpu()).sum() for out, grad in zip((gates, probs), given, strict=True) if grad is not None
        )
        (wanted,) = torch.autograd.grad(total, [logits], retain_graph=True)
        torch.testing.assert_close(choose_experts_backward(*kept, *given, normalize).cpu(), wanted, **close)


def test_equal_and_huge_logits() -> None:
    """Of equal ones the lower number; a softmax of one expert; a row with a NaN stays in its row."""
    rows = [[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 1.0, 0.0, 5.0, 1.0], [0.0] * 5, [1e30, -1e30, 0.0, 0.0, 0.0]]
    gates, ids, _ = choose_experts(torch.tensor([*rows, [float("nan")] * 5], device=DEVICE), 2, False)
    assert ids[:4].tolist() == [[1, 2], [3, 1], [0, 1], [0, 1]]
    assert gates[3].tolist() == [1, 0, 0, 0, 0]
    assert (
        bool(gates[:4].isfinite().all()) and bool(gates[4].isnan().any()) and 0 <= int(ids.min()) <= int(ids.max()) < 5
    )


@pytest.mark.parametrize(("L", "T", "E"), [(3, 7, 4), (2, 0, 4), (1, 5, 3)])
def test_several_routers_lie_side_by_side(L: int, T: int, E: int) -> None:
    logits_TN = _random(T, L * E)
    together = choose_experts(logits_TN.unflatten(1, (L, E)).transpose(0, 1), 2, True)
    apart = [choose_experts(part.contiguous(), 2, True) for part in logits_TN.split(E, dim=1)]
    for got, want in zip(together, zip(*apart, strict=True), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, torch.stack(want))
    _, ids, probs = together
    grad = _random(L, T, E, seed=1)
    got = choose_experts_backward(probs, ids, grad, None, True)
    assert got.transpose(0, 1).is_contiguous()
    wanted = [choose_experts_backward(*each, None, True) for each in zip(probs, ids, grad, strict=True)]
    torch.testing.assert_close(got, torch.stack(wanted))


@pytest.mark.skipif(KERNELS, reason="the schema and the shapes are those of the plain form too")
def test_operators_keep_to_their_schema_and_tell_the_shapes() -> None:
    x, keys, gates = _random(5, 12), _keys(5), _random(5, 4, seed=1)
    logits_LTE = _random(5, 12).unflatten(1, (3, 4)).transpose(0, 1)
    _, ids, probs = choose_experts(logits_LTE, 2, True)
    calls = [(drop, (x, keys, 3, 0.5)), (add_dropped_, (x, x.clone(), keys, 3, 0.5))]
    calls += [(gate_ranks, (x, gates, 2.0)), (gate_ranks_backward_, (x, x.clone(), gates, 2.0))]
    calls += [
        (choose_experts, (logits, 2, normalize)) for logits, normalize in product((gates, logits_LTE), (True, False))
    ]
    calls += [(choose_experts_backward, (probs, ids, probs.clone(), None, True))]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def launch_all(dtype: torch.dtype) -> None:
    """Run every kernel once, on tensors of a whole layer's width, whatever their device."""
    from malora_dist.ops import dropout_kernel, gating_kernels, routing_kernels

    x, keys = torch.zeros(128, 4096, dtype=dtype), torch.zeros(128, dtype=torch.int32)
    for add in (False, True):
        dropout_kernel.launch(x, torch.zeros_like(x), keys, 3, 5, add=add)
    z, gates = torch.zeros(128, 8 * 12, dtype=dtype), torch.zeros(128, 8)
    gating_kernels.launch_backward(gating_kernels.launch_forward(z, gates, 2.0), z, gates, 2.0)
    _, ids, probs = routing_kernels.launch_forward(torch.zeros(128, 24).unflatten(1, (3, 8)).transpose(0, 1), 2, False)
    routing_kernels.launch_backward(torch.empty_like(probs), probs, ids, probs, probs, False)
