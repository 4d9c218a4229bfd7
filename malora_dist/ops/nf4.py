"""4-bit NormalFloat weights as one row of bytes, in the codes of bitsandbytes (QLoRA, arXiv 2305.14314).

A packed weight is [two 4-bit codes a byte | one scale a block of 64 weights]. Plain scales are fp32. Double
quantisation stores them as 8-bit codes with one fp32 scale per 256 of them and one fp32 offset, all in the same bytes:
ZeRO-3 then partitions every byte of the weight, and no cast of floating-point parameters can touch it.

The kernels of bitsandbytes unpack it. They do not make one: those for CUDA take approximate reciprocals, and those
for CPU and CUDA break ties differently, so that the base would depend on the device that quantised it. `quantize_nf4`
is made of operations that IEEE 754 defines, and gives the same bytes on every device.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.ops.bitsandbytes_import import without_kernel_warning
from malora_dist.ops.nf4_layout import BLOCK, SCALE_BLOCK, nf4_sections

with without_kernel_warning():
    import bitsandbytes.functional as bnb

# Names the definition of `quantize_nf4`: another definition, that gives other bytes, needs another name.
QUANTIZER = "nf4-nearest-1"
# Weights that are quantised at a time: their temporaries are bounded, whatever the size of the matrix.
CHUNK = 2**22
# Appendix E of the paper.
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
UNPACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tables(NamedTuple):
    """What the 4-bit codes of weights (16) and the 8-bit codes of scales (256) stand for, and the middles between."""

    values: Tensor
    scale_values: Tensor
    middles: Tensor
    scale_middles: Tensor


@cache
def tables(device: torch.device) -> Tables:
    """Return the fp32 tables on a device, made at the first call for it."""
    # Neither inference mode nor a default device of the first caller may show in what later ones get.
    with torch.inference_mode(False), torch.device("cpu"):
        values, scale_values = torch.tensor(CODES, dtype=torch.float32), bnb.create_dynamic_map()
        made = values, scale_values, _middles(values), _middles(scale_values)
        return Tables(*(table.to(device) for table in made))


def _middles(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


@torch.no_grad()
def quantize_nf4(weight_OI: Tensor, double_quant: bool = False) -> Tensor:
    """Pack a weight matrix of any float dtype into uint8, on its device; the same bytes on every device.

    A block's scale is its largest magnitude, and a weight's code the one whose value is nearest to weight * (1 / scale)
    in fp32, the lower one of two. Scales are quantised like weights, less their mean, with the 8-bit code.
    """
    known = tables(weight_OI.device)
    codes, scales = [], []
    for part in weight_OI.detach().reshape(-1).split(CHUNK):
        nibbles, absmax = _nearest(part.float(), BLOCK, known.middles)
        codes.append(nibbles[: len(part) + len(part) % 2].view(-1, 2))
        scales.append(absmax)
    packed, absmax = torch.cat([pair[:, 0] << 4 | pair[:, 1] for pair in codes]), torch.cat(scales)
    if not double_quant:
        return _join([packed, absmax])
    offset = _mean(absmax)
    scale_codes, scale_absmax = _nearest(absmax - offset, SCALE_BLOCK, known.scale_middles)
    return _join([packed, scale_codes[: len(absmax)], scale_absmax, offset])


def _nearest(values: Tensor, block: int, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Return a code for each value, and for zeros that fill the last block; and the largest magnitude of each block."""
    missing = -len(values) % block
    rows = (F.pad(values, (0, missing)) if missing else values).view(-1, block)
    absmax = rows.abs().amax(dim=1)
    # Below, in blocks of nothing but zeros, 1 / scale would not be finite.
    inverse = absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    codes = torch.bucketize(rows * inverse[:, None], middles, out_int32=True)
    return codes.to(torch.uint8).view(-1), absmax


def _mean(values: Tensor) -> Tensor:
    """Return the mean (1,) of fp32 numbers, added in fp64, in an order that no device and no thread count chooses."""
    total = F.pad(values.double(), (0, (1 << (len(values) - 1).bit_length()) - len(values)))
    while len(total) > 1:
        half = len(total) // 2
        total = total[:half] + total[half:]
    return (total / len(values)).float()


def pack_nf4(codes: Tensor, state: bnb.QuantState) -> Tensor:
    """Pack codes (of any storage dtype) and scales, as bitsandbytes keeps them, into uint8."""
    return _join([codes, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])])


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def dequantize_nf4(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool = False) -> Tensor:
    """Unpack a weight (O, I) to fp32, bf16 or fp16, rounded as bitsandbytes' Linear4bit does.

    One kernel, or three with double quantisation, and one more where the packed weight's fp32 numbers are not aligned.
    """
    if dtype not in UNPACKED_DTYPES:
        # The kernels do not look, and would leave the matrix as they found it.
        raise TypeError(f"dtype={dtype} must be one of {', '.join(map(str, UNPACKED_DTYPES))}")
    codes, *scales = packed.split(nf4_sections(math.prod(shape), double_quant))
    absmax = _floats(scales[-1])
    if double_quant:
        values = tables(packed.device).scale_values
        parts = scales[0], absmax[:-1], values, SCALE_BLOCK, torch.float32
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(*parts).add_(absmax[-1])
    # For rows of odd length bitsandbytes has no kernel on the CPU; codes come in pairs.
    kernel_shape = shape if shape[1] % 2 == 0 else (2 * len(codes),)
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", kernel_shape, dtype)
    return weight.view(-1)[: math.prod(shape)].view(shape)


def _floats(part: Tensor) -> Tensor:
    """View bytes as fp32 numbers, or copy them if they are not aligned, as in a slice that ZeRO-3 gathered."""
    # Addresses are not known while torch.compile traces.
    aligned = not torch.compiler.is_compiling() and part.storage_offset() % torch.float32.itemsize == 0
    return (part if aligned else part.clone()).view(torch.float32)
