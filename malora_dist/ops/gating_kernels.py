"""Gates on the experts' ranks, one pass over z in each direction: Triton kernels. Imported only where they run."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora_dist.ops.operators import compute_type

BLOCK_T = 16
# Numbers of a tile's row.
BLOCK_N = 256


@triton.jit
def tile(
    T: tl.tensor, E: tl.tensor, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return tokens (t, 1, 1) and experts (1, e, 1) of this program, columns (1, e, r) of z, and which cells exist."""
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :, None]
    r = tl.arange(0, BLOCK_R)[None, None, :]
    return t, e, e * R + r, (t < T) & (e < E) & (r < R)


@triton.jit
def gates_of(
    gates_ptr: tl.tensor, t: tl.tensor, e: tl.tensor, T: tl.tensor, E: tl.tensor, scaling: tl.tensor
) -> tl.tensor:
    """Return scaling * gate, (t, e, 1)."""
    return tl.load(gates_ptr + t * E + e, mask=(t < T) & (e < E), other=0.0) * scaling


@triton.jit(do_not_specialize=("T",))
def gate_rows(
    z_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scaling: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    z_stride: tl.tensor,
    R: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Write out = z * gate * scaling. Grid: blocks of T, blocks of E."""
    t, e, n, mask = tile(T, E, R, BLOCK_T, BLOCK_E, BLOCK_R)
    weights = gates_of(gates_ptr, t, e, T, E, scaling).to(out_ptr.dtype.element_ty)
    z = tl.load(z_ptr + t * z_stride + n, mask=mask, other=0.0)
    product = z.to(COMPUTE) * weights.to(COMPUTE)
    tl.store(out_ptr + t * (E * R) + n, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("T",))
def gate_rows_backward(
    grad_ptr: tl.tensor,
    z_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    out_ptr: tl.tensor,
    grad_gates_ptr: tl.tensor,
    scaling: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    z_stride: tl.tensor,
    R: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Write out = z * gate * scaling, grad_gates = scaling <grad, z> of experts, grad *= gate * scaling. Same grid."""
    t, e, n, mask = tile(T, E, R, BLOCK_T, BLOCK_E, BLOCK_R)
    weights = gates_of(gates_ptr, t, e, T, E, scaling).to(out_ptr.dtype.element_ty).to(COMPUTE)
    z = tl.load(z_ptr + t * z_stride + n, mask=mask, other=0.0).to(COMPUTE)
    place = t * (E * R) + n
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(COMPUTE)
    sums = tl.sum(grad * z, axis=2) * scaling
    t_of_sum, e_of_sum = tl.reshape(t, [BLOCK_T, 1]), tl.reshape(e, [1, BLOCK_E])
    tl.store(grad_gates_ptr + t_of_sum * E + e_of_sum, sums, mask=(t_of_sum < T) & (e_of_sum < E))
    tl.store(out_ptr + place, (z * weights).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_ptr + place, (grad * weights).to(grad_ptr.dtype.element_ty), mask=mask)


def launch_forward(z_TN: Tensor, gates_TE: Tensor, scaling: float) -> Tensor:
    """Return z * gate * scaling, (T, E*R)."""
    out_TN = z_TN.new_empty(z_TN.shape)
    if out_TN.numel() > 0:
        z_TN, gates_TE = _rows(z_TN), gates_TE.contiguous()
        arguments, grid = _arguments(z_TN, gates_TE)
        gate_rows[grid](z_TN, gates_TE, out_TN, scaling, *arguments.pop("sizes"), **arguments)
    return out_TN


def launch_backward(grad_TN: Tensor, z_TN: Tensor, gates_TE: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the product (T, E*R) again and the gradient of the gates (T, E); turn `grad_TN` into that of z."""
    assert grad_TN.is_contiguous()
    out_TN, grad_gates_TE = z_TN.new_empty(z_TN.shape), gates_TE.new_empty(gates_TE.shape)
    if out_TN.numel() > 0:
        z_TN, gates_TE = _rows(z_TN), gates_TE.contiguous()
        arguments, grid = _arguments(z_TN, gates_TE)
        tensors = grad_TN, z_TN, gates_TE, out_TN, grad_gates_TE
        gate_rows_backward[grid](*tensors, scaling, *arguments.pop("sizes"), **arguments)
    return out_TN, grad_gates_TE


def _rows(z_TN: Tensor) -> Tensor:
    return z_TN if z_TN.stride(1) == 1 else z_TN.contiguous()


def _arguments(z_TN: Tensor, gates_TE: Tensor) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return what both kernels take behind their tensors and the scaling, and their grid."""
    T, E = gates_TE.shape
    R = z_TN.shape[1] // E
    block_r = triton.next_power_of_2(R)
    block_e = min(triton.next_power_of_2(E), max(1, BLOCK_N // block_r))
    sizes = (T, E, z_TN.stride(0))
    blocks = {"BLOCK_T": BLOCK_T, "BLOCK_E": block_e, "BLOCK_R": block_r}
    compute = compute_type(torch.promote_types(z_TN.dtype, gates_TE.dtype))
    grid = (triton.cdiv(T, BLOCK_T), triton.cdiv(E, block_e))
    return {"sizes": sizes, "R": R, "COMPUTE": compute, **blocks}, grid
