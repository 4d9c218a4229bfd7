"""The 4-bit linear against F.linear with its dequantised weight, and against bitsandbytes' own layer."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.nf4 import dequantize_nf4, pack_nf4, quantize_nf4

O, I = 96, 128  # noqa: E741


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layer(double_quant: bool = False, dtype: torch.dtype = torch.float32, bias: bool = True) -> NF4Linear:
    packed = quantize_nf4((_normal(O, I, seed=0) * 0.02).to(dtype), double_quant)
    return NF4Linear(packed, _normal(O, seed=1).to(dtype) if bias else None, I, O, double_quant)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_equals_linear_with_the_dequantised_weight(double_quant: bool, dtype: torch.dtype, bias: bool) -> None:
    layer = _layer(double_quant, dtype, bias)
    weight = dequantize_nf4(layer.packed_weight, (O, I), dtype, double_quant)
    x = _normal(2, 5, I, seed=2).to(dtype).requires_grad_()
    gradient = _normal(2, 5, O, seed=3).to(dtype)
    y, expected = layer(x), F.linear(x, weight, layer.bias)
    assert y.dtype == dtype and torch.equal(y, expected)
    (got,), (want,) = torch.autograd.grad(y, x, gradient), torch.autograd.grad(expected, x, gradient)
    assert torch.equal(got, want)


@pytest.mark.parametrize("double_quant", [False, True])
def test_equals_linear4bit_of_bitsandbytes(double_quant: bool) -> None:
    layer = _layer()
    theirs = bnb.nn.Linear4bit(I, O, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double_quant)
    theirs.load_state_dict({"weight": _normal(O, I, seed=0) * 0.02, "bias": layer.bias.detach()})
    theirs.weight = bnb.nn.Params4bit(
        theirs.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double_quant, blocksize=64
    )
    theirs = theirs.to("cpu")
    assert theirs.weight.dtype == torch.uint8  # it is quantised
    layer = NF4Linear(pack_nf4(theirs.weight.data, theirs.weight.quant_state), layer.bias, I, O, double_quant)
    x = _normal(5, I, seed=2).requires_grad_()
    gradient = _normal(5, O, seed=3)
    y, expected = layer(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    (got,), (want,) = torch.autograd.grad(y, x, gradient), torch.autograd.grad(expected, x, gradient)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_compiles_without_a_graph_break() -> None:
    layer, x = _layer(), _normal(5, I, seed=2)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_keeps_nothing_for_backward() -> None:
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = _layer()(_normal(5, I, seed=2).requires_grad_())
    assert y.requires_grad and saved == []


def test_blob_may_be_released_between_forward_and_backward() -> None:
    """As ZeRO-3 does: the bytes are gathered for forward, released, and gathered again elsewhere for backward."""
    layer = _layer(double_quant=True)
    weight = layer.dequantize(torch.float32)
    whole = layer.packed_weight.data
    x, gradient = _normal(5, I, seed=2).requires_grad_(), _normal(5, O, seed=3)
    y = layer(x)
    layer.packed_weight.data = torch.empty(0, dtype=torch.uint8)
    layer.packed_weight.data = whole.clone()
    whole.zero_()
    (got,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(got, gradient @ weight)


def test_nothing_is_trainable() -> None:
    layer = _layer()
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == {"packed_weight": False, "bias": False}
    # Casting a model must not touch the bytes.
    assert layer.to(torch.bfloat16).packed_weight.dtype == torch.uint8
