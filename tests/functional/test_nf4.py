"""NF4 blobs against bitsandbytes bit for bit, and against the naive twin."""

import bitsandbytes.functional as bnb
import pytest
import torch

from malora_dist.functional.nf4 import dequantize_nf4, nf4_bytes, quantize_nf4
from tests.reference import NF4_CODES, nf4_reference

SHAPES = [(64, 64), (96, 200), (7, 9), (1, 1), (260, 130)]


def _weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize(
    ("numel", "plain", "double"),
    [
        # half a byte a weight | 4 bytes a 64 weights, or 1 byte a 64, 4 a 64 * 256 and 4
        (64 * 64, 2048 + 4 * 64, 2048 + 64 + 4 + 4),
        (256 * 65, 8320 + 4 * 260, 8320 + 260 + 2 * 4 + 4),
        (63, 32 + 4, 32 + 1 + 4 + 4),
        (65, 33 + 2 * 4, 33 + 2 + 4 + 4),
    ],
)
def test_bytes_of_a_blob(numel: int, plain: int, double: int) -> None:
    for double_quant, size in ((False, plain), (True, double)):
        assert nf4_bytes(numel, double_quant) == size
        blob = quantize_nf4(_weight((1, numel)), double_quant)
        assert (blob.dtype, blob.shape) == (torch.uint8, (size,))


def test_bits_per_weight_of_a_large_matrix() -> None:
    numel = 4096 * 11008
    assert nf4_bytes(numel) * 8 / numel == 4.5
    assert nf4_bytes(numel, True) * 8 / numel == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_bitsandbytes_bit_for_bit(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    weight = _weight(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    expected = bnb.dequantize_4bit(codes, state)
    blob = quantize_nf4(weight, double_quant)
    ours = dequantize_nf4(blob, shape, dtype, double_quant)
    assert ours.dtype == dtype and torch.equal(ours, expected)
    # A blob inside the flat buffer of a partition starts at any byte.
    for offset in (1, 2, 3):
        shifted = torch.cat([blob.new_zeros(offset), blob])[offset:]
        assert torch.equal(dequantize_nf4(shifted, shape, dtype, double_quant), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_twin(shape: tuple[int, int]) -> None:
    weight = _weight(shape)
    ours = dequantize_nf4(quantize_nf4(weight), shape, torch.float32)
    torch.testing.assert_close(ours.double(), nf4_reference(weight), rtol=1e-6, atol=1e-9)


def test_double_quantisation_is_exact_where_blocks_share_their_largest() -> None:
    """Scales equal to their mean leave 0 for the 8-bit type, which it holds: what is made of codes comes back."""
    weight = 0.75 * torch.tensor(NF4_CODES).repeat(4 * 300).reshape(160, 120)
    for double_quant in (False, True):
        blob = quantize_nf4(weight, double_quant)
        torch.testing.assert_close(dequantize_nf4(blob, (160, 120), torch.float32, double_quant), weight)


def test_double_quantisation_moves_scales_little() -> None:
    """8-bit dynamic codes lie at most 0.036 apart, so a scale moves by at most 0.018 of the largest deviation."""
    weight = _weight((300, 128)) * torch.logspace(-1, 1, 300)[:, None]
    plain = dequantize_nf4(quantize_nf4(weight), (300, 128), torch.float32).view(-1, 64)
    double = dequantize_nf4(quantize_nf4(weight, True), (300, 128), torch.float32, True).view(-1, 64)
    scales = weight.view(-1, 64).abs().amax(dim=1)
    bound = 0.018 * (scales - scales.mean()).abs().max()
    assert float((double - plain).abs().max()) <= bound
    assert not torch.equal(double, plain)
