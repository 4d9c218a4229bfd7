"""How many bytes 4-bit weights take, and of what: the layout of `ops.nf4`. Needs no torch."""

import math

# Weights that share a scale, and scales that share one where they are quantised too.
BLOCK = 64
SCALE_BLOCK = 256
FP32 = 4


def nf4_sections(numel: int, double_quant: bool) -> list[int]:
    """Count bytes of codes, and of scales: fp32, or 8-bit codes and then their scales and offset in fp32."""
    blocks = math.ceil(numel / BLOCK)
    scales = [blocks, FP32 * math.ceil(blocks / SCALE_BLOCK) + FP32] if double_quant else [FP32 * blocks]
    return [math.ceil(numel / 2), *scales]


def nf4_bytes(numel: int, double_quant: bool = False) -> int:
    """Return the bytes of `numel` packed weights: 4.5 bits each, or about 4.127 with double quantisation."""
    return sum(nf4_sections(numel, double_quant))
