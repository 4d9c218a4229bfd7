"""Stage nf4: unpacking of 4-bit weights against bitsandbytes' own: numbers, time, kernels and waits.

That the bytes are the CPU's, and that a packed weight may begin anywhere, are tests (`pytest -m gpu`).
"""

import sys
from functools import partial

import bitsandbytes.functional as bnb
import torch

from benchmarks.gpu.measure import DEVICE, GPU, kernels, milliseconds, waits
from benchmarks.gpu.verdicts import Verdicts
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.nf4 import dequantize_nf4, quantize_nf4

SHAPE = (4096, 11008) if GPU else (128, 256)
DTYPES = (torch.bfloat16, torch.float32)


def weight(dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(DEVICE, dtype)


def near(dtype: torch.dtype, double_quant: bool) -> str:
    """Both are within half a code of the weight; codes may differ where two are about as near."""
    W = weight(dtype, (192, 320))
    ours = dequantize_nf4(quantize_nf4(W, double_quant), (192, 320), dtype, double_quant)
    codes, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    theirs = bnb.dequantize_4bit(codes, state)
    different = float((ours != theirs).float().mean())
    error, other = (float((each.float() - W.float()).norm() / W.float().norm()) for each in (ours, theirs))
    assert error <= 1.01 * other, f"error {error:.4f}, bitsandbytes' {other:.4f}"
    return f"error {error:.4f}, bitsandbytes' {other:.4f}; {different:.2%} of the numbers differ"


def product(double_quant: bool) -> str:
    """Forward and backward of a linear against its unpacked weight."""
    linear = NF4Linear(quantize_nf4(weight(torch.float32, (256, 512)), double_quant), None, 512, 256, double_quant)
    x = torch.randn(7, 512, device=DEVICE, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    full = linear.dequantize(torch.float32)
    torch.testing.assert_close(y, x @ full.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(x.grad, full.sum(0).expand_as(x), atol=1e-3, rtol=1e-3)
    return "as the unpacked weight's"


def speed(double_quant: bool) -> str:
    W = weight(torch.bfloat16, SHAPE)
    linear = NF4Linear(quantize_nf4(W, double_quant), None, SHAPE[1], SHAPE[0], double_quant)
    codes, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    said = []
    for name, unpack in (
        ("ours", lambda: linear.dequantize(torch.bfloat16)),
        ("bitsandbytes", lambda: bnb.dequantize_4bit(codes, state)),
    ):
        said.append(f"{name} {milliseconds(unpack):.3f} ms, {kernels(unpack).number} kernels, waits {waits(unpack)}")
    return f"{SHAPE}: {'; '.join(said)}"


def main() -> int:
    verdicts = Verdicts()
    for double_quant in (False, True):
        kind = "double quantisation" if double_quant else "plain"
        for dtype in DTYPES:
            verdicts.attempt(f"{kind} {dtype}", partial(near, dtype, double_quant))
        verdicts.attempt(f"product {kind}", partial(product, double_quant))
        verdicts.attempt(f"time {kind}", partial(speed, double_quant))
    verdicts.log("bound for unpacking 4096 x 11008 to bf16 at 3.3 TB/s: 0.035 ms")
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
