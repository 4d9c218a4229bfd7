"""Keyed dropout as one pass over x: a Triton kernel. Imported only where it runs; triton is an optional dependency."""

import triton
import triton.language as tl
from torch import Tensor

from malora_dist.ops.operators import compute_type

BLOCK_T, BLOCK_I = 16, 256


@triton.jit
def mix(bits: tl.tensor) -> tl.tensor:
    """Mix bits as `ops.dropout` does, on uint32."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit(do_not_specialize=("salt", "T"))
def drop_rows(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    salt: tl.tensor,
    limit: tl.tensor,
    T: tl.tensor,
    I: tl.tensor,  # noqa: E741
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    ADD: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """Write x where its mask keeps it, else 0, to out (T, I); with ADD add it there. Grid: blocks of T, of I."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (rows < T)[:, None] & (columns < I)[None, :]
    keys = (tl.load(keys_ptr + rows, mask=rows < T, other=0) + salt).to(tl.uint32, bitcast=True)
    # One 32-bit number decides over two neighbouring features: the low half over the even one.
    bits = mix(keys[:, None] + mix((columns // 2).to(tl.uint32, bitcast=True))[None, :])
    half = (bits >> ((columns % 2) * 16).to(tl.uint32, bitcast=True)[None, :]) & 0x7FFF
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    x = tl.where(half < limit, x, 0.0)
    place = out_ptr + rows[:, None] * out_stride + columns[None, :]
    if ADD:
        x = x.to(COMPUTE) + tl.load(place, mask=mask, other=0.0).to(COMPUTE)
    tl.store(place, x.to(out_ptr.dtype.element_ty), mask=mask)


def launch(x_TI: Tensor, out_TI: Tensor, keys_T: Tensor, salt: int, limit: int, *, add: bool) -> Tensor:
    """Run the kernel over x (T, I) and return `out_TI`."""
    T, I = x_TI.shape  # noqa: E741
    if x_TI.numel() == 0:
        return out_TI
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    assert out_TI.stride(1) == 1
    grid = (triton.cdiv(T, BLOCK_T), triton.cdiv(I, BLOCK_I))
    tile = {"COMPUTE": compute_type(x_TI.dtype), "BLOCK_T": BLOCK_T, "BLOCK_I": BLOCK_I}
    drop_rows[grid](x_TI, out_TI, keys_T, salt, limit, T, I, x_TI.stride(0), out_TI.stride(0), ADD=add, **tile)
    return out_TI
