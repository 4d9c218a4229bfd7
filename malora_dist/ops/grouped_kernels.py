"""Triton kernels over rows sorted by expert. Imported only when used: triton is an optional dependency.

Three kernels serve both directions. A *wide* row (T, W) is an input or output of the adapter's factors, a *narrow* one
(T, K, R) lives in the experts' ranks; `weight` (E, W, R) is B or the down, its axes given by their strides.

    contract_rows   narrow_tk  = weight_e^T wide_t          z = C h;  dz = B^T dy, and from it the gates' gradients
    expand_rows     wide_t    += weight_e narrow_tk         y += B z; dh = C^T dz
    sum_rows        weight_e   = sum wide_t narrow_tk^T     dB, dC

Rows are grouped per choice k, so that a wide row lies in one block per launch and has one writer. No atomics, sums in
fp32: the same inputs give the same bits. Never measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

# NumPy has no bf16: the interpreter would multiply the bit patterns.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
COMPUTE_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Numbers that differ from launch to launch: no kernel is compiled anew for a special value of them.
CHANGING = ("T", "num_blocks", "k")


@triton.jit
def multiply(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Compute total + a @ b in fp32; fp32 factors are not rounded to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_tile(
    pointer: tl.tensor, rows: tl.tensor, row_mask: tl.tensor, columns: tl.tensor, column_mask: tl.tensor
) -> tl.tensor:
    """Load pointer[rows + columns] as (rows, columns), 0 where a mask is false. Both are offsets, strides included."""
    return tl.load(pointer + rows[:, None] + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def block_tokens(
    tokens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    firsts_ptr: tl.tensor,
    block: tl.tensor,
    k: tl.tensor,
    expert: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    BLOCK_T: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the tokens of a block, all with `expert` as choice k, and which of them there are."""
    rows = tl.load(firsts_ptr + block) + tl.arange(0, BLOCK_T)
    row_mask = rows < tl.load(starts_ptr + k * (E + 1) + expert + 1)
    return tl.load(tokens_ptr + k * T + rows, mask=row_mask, other=0), row_mask


@triton.jit
def load_weights(gates_ptr: tl.tensor, slots: tl.tensor, row_mask: tl.tensor, scaling: tl.tensor) -> tl.tensor:
    """Load scaling * gate, (rows, 1) fp32."""
    return (tl.load(gates_ptr + slots, mask=row_mask, other=0.0).to(tl.float32) * scaling)[:, None]


@triton.jit(do_not_specialize=CHANGING)
def contract_rows(
    wide_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    narrow_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    z_ptr: tl.tensor,
    grad_gates_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    firsts_ptr: tl.tensor,
    T: tl.tensor,
    num_blocks: tl.tensor,
    K: tl.tensor,
    E: tl.tensor,
    W: tl.tensor,
    scaling: tl.tensor,
    z_stride_t: tl.tensor,
    z_stride_k: tl.tensor,
    narrow_stride_t: tl.tensor,
    narrow_stride_k: tl.tensor,
    wide_stride_t: tl.tensor,
    wide_stride_w: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_w: tl.tensor,
    weight_stride_r: tl.tensor,
    R: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Set narrow[t, k] = weight_e^T wide[t] over one block of rows. Grid: blocks, K.

    With BACKWARD `wide` is dy: u = B_e^T dy_t, grad_gates[t, k] = scaling <u, z[t, k]>, narrow = scaling * gate * u.
    """
    k = tl.program_id(1)
    block = k * num_blocks + tl.program_id(0)
    expert = tl.load(experts_ptr + block)
    if expert >= E:
        return
    tokens, row_mask = block_tokens(tokens_ptr, starts_ptr, firsts_ptr, block, k, expert, T, E, BLOCK_T)
    slots = tokens * K + k
    z_rows = tokens * z_stride_t + k * z_stride_k
    narrow_rows = tokens * narrow_stride_t + k * narrow_stride_k
    weight_ptr += expert * weight_stride_e
    gate_sums = tl.zeros([BLOCK_T], dtype=tl.float32)
    for r_start in range(0, R, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for w_start in range(0, W, BLOCK_W):
            w = w_start + tl.arange(0, BLOCK_W)
            wide = load_tile(wide_ptr, tokens * wide_stride_t, row_mask, w * wide_stride_w, w < W)
            weight = load_tile(weight_ptr, w * weight_stride_w, w < W, r * weight_stride_r, r < R)
            total = multiply(wide.to(COMPUTE), weight.to(COMPUTE), total)
        if BACKWARD:
            z = load_tile(z_ptr, z_rows, row_mask, r, r < R)
            gate_sums += tl.sum(total * z.to(tl.float32), axis=1)
            total *= load_weights(gates_ptr, slots, row_mask, scaling)
        mask = row_mask[:, None] & (r < R)[None, :]
        tl.store(narrow_ptr + narrow_rows[:, None] + r[None, :], total.to(narrow_ptr.dtype.element_ty), mask=mask)
    if BACKWARD:
        tl.store(grad_gates_ptr + slots, gate_sums * scaling, mask=row_mask)


@triton.jit(do_not_specialize=CHANGING)
def expand_rows(
    wide_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    narrow_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    firsts_ptr: tl.tensor,
    k: tl.tensor,
    T: tl.tensor,
    num_blocks: tl.tensor,
    K: tl.tensor,
    E: tl.tensor,
    W: tl.tensor,
    scaling: tl.tensor,
    narrow_stride_t: tl.tensor,
    narrow_stride_k: tl.tensor,
    wide_stride_t: tl.tensor,
    wide_stride_w: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_w: tl.tensor,
    weight_stride_r: tl.tensor,
    R: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Set wide[t] = weight_e narrow[t, k] over one block of rows of choice `k` alone. Grid: blocks, blocks of W.

    GATED: times scaling * gate. ADD: on top of what `wide` holds.
    """
    block = k * num_blocks + tl.program_id(0)
    expert = tl.load(experts_ptr + block)
    if expert >= E:
        return
    tokens, row_mask = block_tokens(tokens_ptr, starts_ptr, firsts_ptr, block, k, expert, T, E, BLOCK_T)
    slots = tokens * K + k
    narrow_rows = tokens * narrow_stride_t + k * narrow_stride_k
    weight_ptr += expert * weight_stride_e
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.float32)
    for r_start in range(0, R, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        narrow = load_tile(narrow_ptr, narrow_rows, row_mask, r, r < R)
        weight = load_tile(weight_ptr, r * weight_stride_r, r < R, w * weight_stride_w, w < W)
        total = multiply(narrow.to(COMPUTE), weight.to(COMPUTE), total)
    if GATED:
        total *= load_weights(gates_ptr, slots, row_mask, scaling)
    pointers = wide_ptr + (tokens * wide_stride_t)[:, None] + (w * wide_stride_w)[None, :]
    mask = row_mask[:, None] & (w < W)[None, :]
    if ADD:
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, total.to(wide_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=CHANGING)
def sum_rows(
    wide_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    narrow_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    E: tl.tensor,
    W: tl.tensor,
    narrow_stride_t: tl.tensor,
    narrow_stride_k: tl.tensor,
    wide_stride_t: tl.tensor,
    wide_stride_w: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_w: tl.tensor,
    weight_stride_r: tl.tensor,
    R: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Set weight_e (W, R) = sum over the rows of expert e of wide[t] narrow[t, k]^T. Grid: blocks of W, blocks of R, E.

    An expert without rows gets zeros.
    """
    expert = tl.program_id(2)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_W, BLOCK_R], dtype=tl.float32)
    for k in range(0, K):
        start = tl.load(starts_ptr + k * (E + 1) + expert)
        end = tl.load(starts_ptr + k * (E + 1) + expert + 1)
        for first in range(start, end, BLOCK_T):
            rows = first + tl.arange(0, BLOCK_T)
            row_mask = rows < end
            tokens = tl.load(tokens_ptr + k * T + rows, mask=row_mask, other=0)
            narrow_rows = tokens * narrow_stride_t + k * narrow_stride_k
            narrow = load_tile(narrow_ptr, narrow_rows, row_mask, r, r < R)
            wide = load_tile(wide_ptr, tokens * wide_stride_t, row_mask, w * wide_stride_w, w < W)
            total = multiply(tl.trans(wide.to(COMPUTE)), narrow.to(COMPUTE), total)
    pointers = (
        weight_ptr
        + expert.to(tl.int64) * weight_stride_e
        + (w * weight_stride_w)[:, None]
        + (r * weight_stride_r)[None, :]
    )
    tl.store(pointers, total.to(weight_ptr.dtype.element_ty), mask=(w < W)[:, None] & (r < R)[None, :])
