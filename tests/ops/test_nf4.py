"""Packed NF4 weights against bitsandbytes bit for bit, and against the naive twin."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from malora_dist.ops.nf4 import dequantize_nf4, pack_nf4, quantize_nf4, tables
from malora_dist.ops.nf4_layout import nf4_bytes
from tests.reference import NF4_CODES, nf4_reference

SHAPES = [(64, 64), (96, 200), (7, 9), (1, 1), (260, 130)]
CPU = torch.device("cpu")


def _weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def _quantised_by_bitsandbytes(weight: Tensor, double_quant: bool) -> tuple[Tensor, bnb.QuantState]:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    return codes, state


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
        packed = quantize_nf4(_weight((1, numel)), double_quant)
        assert (packed.dtype, packed.shape) == (torch.uint8, (size,))


def test_bits_per_weight_of_a_large_matrix() -> None:
    numel = 4096 * 11008
    assert nf4_bytes(numel) * 8 / numel == 4.5
    assert nf4_bytes(numel, True) * 8 / numel == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_unpacked_as_by_bitsandbytes(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    codes, state = _quantised_by_bitsandbytes(_weight(shape, dtype), double_quant)
    packed = pack_nf4(codes, state)
    # bitsandbytes compiles a kernel for rows of odd length, and has one for the same numbers in one row of even length.
    state.shape = torch.Size((1, 2 * len(codes)))
    expected = bnb.dequantize_4bit(codes, state).view(-1)[: shape[0] * shape[1]].view(shape)
    ours = dequantize_nf4(packed, shape, dtype, double_quant)
    assert ours.dtype == dtype and torch.equal(ours, expected)
    # A packed weight inside the flat buffer of a partition starts at any byte.
    for offset in (1, 2, 3, 5):
        shifted = torch.cat([packed.new_zeros(offset), packed])[offset:]
        assert torch.equal(dequantize_nf4(shifted, shape, dtype, double_quant), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_bitsandbytes_on_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = _weight(shape, dtype)
    assert torch.equal(quantize_nf4(weight), pack_nf4(*_quantised_by_bitsandbytes(weight, False)))


def test_scales_are_those_of_bitsandbytes_but_for_ties() -> None:
    """Where two codes are almost equally near, bitsandbytes on the CPU may take the farther one."""
    weight = _weight((700, 256))
    codes, scales = weight.numel() // 2, weight.numel() // 64
    ours, theirs = quantize_nf4(weight, True), pack_nf4(*_quantised_by_bitsandbytes(weight, True))
    assert torch.equal(ours[:codes], theirs[:codes])
    difference = (ours.int() - theirs.int())[codes : codes + scales].abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) <= 0.01
    numbers = [packed[codes + scales :].view(torch.float32) for packed in (ours, theirs)]
    torch.testing.assert_close(*numbers, rtol=1e-6, atol=0)
    errors = [(dequantize_nf4(b, (700, 256), torch.float32, True) - weight).square().mean() for b in (ours, theirs)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


def test_every_number_takes_the_nearest_code_and_the_lower_of_two() -> None:
    for double_quant in (False, True):
        values, middles = (tables(CPU).scale_values, tables(CPU).scale_middles) if double_quant else tables(CPU)[::2]
        assert torch.equal(middles, (values[1:] + values[:-1]) / 2)
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[1, 0] = 1.0, -1.0
    weight[:, 1:16], weight[:, 16:31] = tables(CPU).middles, tables(CPU).middles.nextafter(torch.tensor(1.0))
    unpacked = dequantize_nf4(quantize_nf4(weight), (2, 64), torch.float32)
    codes = torch.tensor(NF4_CODES, dtype=torch.float32)
    assert torch.equal(unpacked[:, 1:16], codes[:-1].expand(2, 15))
    assert torch.equal(unpacked[:, 16:31], codes[1:].expand(2, 15))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_depend_on_the_numbers_alone(double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on their dtype, strides, the size of chunks, threads, and modes and default devices of the first caller."""
    weight = _weight((401, 300), torch.bfloat16)
    tables.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        expected = quantize_nf4(weight, double_quant)
        dequantize_nf4(expected, (401, 300), torch.bfloat16, double_quant)
    assert not expected.is_meta and not any(table.is_inference() for table in tables(CPU))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(quantize_nf4(weight.float(), double_quant), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(quantize_nf4(weight.T.contiguous().T, double_quant), expected)
    monkeypatch.setattr("malora_dist.ops.nf4.CHUNK", 1024)
    assert torch.equal(quantize_nf4(weight, double_quant), expected)


@pytest.mark.parametrize("double_quant", [False, True])
def test_blocks_without_a_reciprocal(double_quant: bool) -> None:
    """Zeros and the smallest numbers stay what they are to 1e-38; what is no number does not become one."""
    weight = _weight((4, 64))
    weight[1], weight[2], weight[3, 5] = 0.0, 1e-41, torch.nan
    plain = dequantize_nf4(quantize_nf4(weight), (4, 64), torch.float32)
    torch.testing.assert_close(plain[1:3], weight[1:3], rtol=0, atol=1e-38)
    unpacked = dequantize_nf4(quantize_nf4(weight, double_quant), (4, 64), torch.float32, double_quant)
    assert unpacked[3, 6:].isnan().all() and unpacked[:3].isnan().all() == double_quant


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_equals_the_twin(shape: tuple[int, int], double_quant: bool) -> None:
    weight = _weight(shape)
    ours = dequantize_nf4(quantize_nf4(weight, double_quant), shape, torch.float32, double_quant)
    torch.testing.assert_close(ours.double(), nf4_reference(weight, double_quant=double_quant), rtol=1e-5, atol=1e-9)


def test_a_dtype_without_a_kernel_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype=torch.float64 must be one of torch.float32, "):
        dequantize_nf4(quantize_nf4(_weight((64, 64))), (64, 64), torch.float64)


def test_double_quantisation_is_exact_where_blocks_share_their_largest() -> None:
    """Scales equal to their mean leave 0 for the 8-bit type, which it holds: what is made of codes comes back."""
    weight = 0.75 * torch.tensor(NF4_CODES).repeat(4 * 300).reshape(160, 120)
    for double_quant in (False, True):
        packed = quantize_nf4(weight, double_quant)
        torch.testing.assert_close(dequantize_nf4(packed, (160, 120), torch.float32, double_quant), weight)


def test_double_quantisation_moves_scales_little() -> None:
    """8-bit dynamic codes lie at most 0.036 apart, so a scale moves by at most 0.018 of the largest deviation."""
    weight = _weight((300, 128)) * torch.logspace(-1, 1, 300)[:, None]
    plain = dequantize_nf4(quantize_nf4(weight), (300, 128), torch.float32).view(-1, 64)
    double = dequantize_nf4(quantize_nf4(weight, True), (300, 128), torch.float32, True).view(-1, 64)
    scales = weight.view(-1, 64).abs().amax(dim=1)
    bound = 0.018 * (scales - scales.mean()).abs().max()
    assert float((double - plain).abs().max()) <= bound
    assert not torch.equal(double, plain)
