"""4-bit NormalFloat weights as one row of bytes, by the kernels of bitsandbytes (QLoRA, arXiv 2305.14314).

A blob is [two 4-bit codes a byte | one scale a block of 64 weights]. Plain scales are fp32. Double quantisation stores
them as 8-bit codes with one fp32 scale per 256 of them and one fp32 offset, all in the blob: ZeRO-3 then partitions
every byte of the weight, and no cast of floating-point parameters can touch it.
"""

import math

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
SCALE_BLOCK = 256


def _sections(numel: int, double_quant: bool) -> list[int]:
    """Bytes of codes, scales, scales of scales, and offset."""
    blocks = math.ceil(numel / BLOCK)
    scales = [blocks, 4 * math.ceil(blocks / SCALE_BLOCK), 4] if double_quant else [4 * blocks]
    return [math.ceil(numel / 2), *scales]


def nf4_bytes(numel: int, double_quant: bool = False) -> int:
    """Length of the blob of `numel` weights: 4.5 bits a weight, or about 4.127 with double quantisation."""
    return sum(_sections(numel, double_quant))


def quantize_nf4(weight_OI: Tensor, double_quant: bool = False) -> Tensor:
    """uint8 blob of a weight matrix of any float dtype."""
    codes, state = bnb.quantize_4bit(
        weight_OI.detach().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=double_quant
    )
    return pack_nf4(codes, state)


def pack_nf4(codes: Tensor, state: bnb.QuantState) -> Tensor:
    """uint8 blob of codes (of any storage dtype) and scales as bitsandbytes keeps them."""
    parts = [codes, state.absmax]
    if state.nested:
        parts += [state.state2.absmax, state.offset.reshape(1)]
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def dequantize_nf4(blob: Tensor, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool = False) -> Tensor:
    """The weight matrix (O, I) that a blob stands for, in `dtype`. bitsandbytes rounds as its own Linear4bit does."""
    codes, *scales = blob.split(_sections(math.prod(shape), double_quant))
    # Cloned, since a slice that ZeRO-3 gathered may not be aligned for fp32.
    if double_quant:
        codes_8bit, absmax, offset = (
            scales[0],
            scales[1].clone().view(torch.float32),
            scales[2].clone().view(torch.float32),
        )
        code_map = bnb.create_dynamic_map().to(blob.device)
        scale = bnb.dequantize_blockwise(codes_8bit, absmax=absmax, code=code_map, blocksize=SCALE_BLOCK) + offset
    else:
        scale = scales[0].clone().view(torch.float32)
    state = bnb.QuantState(
        absmax=scale,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb.get_4bit_type("nf4", device=blob.device, blocksize=BLOCK),
        quant_type="nf4",
    )
    weight: Tensor = bnb.dequantize_4bit(codes.reshape(-1, 1), state)
    return weight
