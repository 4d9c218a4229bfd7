"""What must not differ by a bit between CPU and GPU: dropout masks, and the bytes of 4-bit weights."""

import pytest
import torch

from malora_dist.ops.dropout import dropout_mask, keyed_dropout, token_keys
from malora_dist.ops.nf4 import dequantize_nf4, quantize_nf4
from tests.gpu.steps import masks

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("p", "features"), [(0.05, 513), (0.5, 64), (0.9, 1)])
def test_masks(p: float, features: int) -> None:
    assert torch.equal(masks(GPU, p, features), masks(CPU, p, features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dropped_forward_and_backward(dtype: torch.dtype) -> None:
    """By whatever kernel drops it, in rows that are not aligned."""
    tokens = torch.arange(97)
    keys = token_keys(3, 7, tokens // 5, tokens % 5)
    kept = dropout_mask(keys, 11, 131, 0.3).bool()
    x = torch.ones(97, 133, dtype=dtype, device=GPU)[:, 1:132].requires_grad_()
    y = keyed_dropout(x, keys.to(GPU), 11, 0.3)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y.cpu() != 0, kept) and torch.equal(grad.cpu() != 0, kept)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(192, 320), (7, 65), (1, 1)])
def test_nf4(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    packed = quantize_nf4(weight, double_quant)
    assert torch.equal(quantize_nf4(weight.to(GPU), double_quant).cpu(), packed)
    for out in (torch.float32, torch.bfloat16):
        wanted = dequantize_nf4(packed, shape, out, double_quant)
        for offset in range(5):
            # Where ZeRO-3 gathers it, a packed weight may begin at any byte.
            moved = torch.empty(len(packed) + offset, dtype=torch.uint8, device=GPU)[offset:].copy_(packed)
            assert torch.equal(dequantize_nf4(moved, shape, out, double_quant).cpu(), wanted), f"from byte {offset} on"
