"""Softmax, top-k and gates of routers, one pass in each direction: Triton kernels. Imported only where they run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora_dist.ops.operators import compute_type

# Numbers of a tile of rows (tokens) by experts.
TILE = 2048


@triton.jit(do_not_specialize=("N", "T"))
def choose_rows(
    logits_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    N: tl.tensor,
    T: tl.tensor,
    router_stride: tl.tensor,
    token_stride: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write probabilities, the K largest, and their gates, of N = L * T rows: those of L routers. Grid: blocks of N."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.arange(0, BLOCK_E)
    there = (rows < N)[:, None] & (experts < E)[None, :]
    places = (rows // T) * router_stride + (rows % T) * token_stride
    logits = tl.load(logits_ptr + places[:, None] + experts[None, :], mask=there, other=float("-inf")).to(COMPUTE)
    # Rows beyond N must not become 0 / 0.
    logits = tl.where((rows < N)[:, None], logits, 0.0)
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = powers / tl.sum(powers, axis=1)[:, None]
    left = tl.where(there, probs, -1.0)
    chosen = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.int1)
    for k in tl.static_range(K):
        # Where a logit is not a number the index may be anything; it stays within the experts.
        best = tl.minimum(tl.argmax(left, axis=1, tie_break_left=True), E - 1)
        tl.store(ids_ptr + rows * K + k, best.to(tl.int64), mask=rows < N)
        hit = experts[None, :] == best[:, None]
        chosen = chosen | hit
        left = tl.where(hit, -2.0, left)
    gates = tl.where(chosen, probs, 0.0)
    if NORMALIZE:
        gates = gates / tl.sum(gates, axis=1)[:, None]
    cells = rows[:, None] * E + experts[None, :]
    tl.store(gates_ptr + cells, gates, mask=there)
    tl.store(probs_ptr + cells, probs, mask=there)


@triton.jit(do_not_specialize=("N", "T"))
def choose_rows_backward(
    probs_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    grad_gates_ptr: tl.tensor,
    grad_probs_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    N: tl.tensor,
    T: tl.tensor,
    router_stride: tl.tensor,
    token_stride: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    WITH_GATES: tl.constexpr,
    WITH_PROBS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write the gradient of the logits, with the strides given. Grid: blocks of N."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.arange(0, BLOCK_E)
    there = (rows < N)[:, None] & (experts < E)[None, :]
    cells = rows[:, None] * E + experts[None, :]
    probs = tl.load(probs_ptr + cells, mask=there, other=0.0)
    grad = tl.zeros_like(probs)
    if WITH_GATES:
        chosen = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.int1)
        for k in tl.static_range(K):
            chosen = chosen | (experts[None, :] == tl.load(ids_ptr + rows * K + k, mask=rows < N, other=0)[:, None])
        grad = tl.load(grad_gates_ptr + cells, mask=there, other=0.0)
        if NORMALIZE:
            kept = tl.where(chosen, probs, 0.0)
            sums = tl.where(rows < N, tl.sum(kept, axis=1), 1.0)[:, None]
            grad = (grad - tl.sum(grad * kept, axis=1)[:, None] / sums) / sums
        grad = tl.where(chosen, grad, 0.0)
    if WITH_PROBS:
        grad += tl.load(grad_probs_ptr + cells, mask=there, other=0.0)
    grad = (grad - tl.sum(grad * probs, axis=1)[:, None]) * probs
    places = (rows // T) * router_stride + (rows % T) * token_stride
    tl.store(grad_logits_ptr + places[:, None] + experts[None, :], grad, mask=there)


def launch_forward(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return gates (..., T, E), ids (..., T, K) and probabilities of logits (..., T, E) of any strides but in E."""
    shape = logits_TE.shape
    gates_TE, probs_TE = (logits_TE.new_empty(shape) for _ in range(2))
    ids_TK = logits_TE.new_empty((*shape[:-1], top_k), dtype=torch.int64)
    if logits_TE.numel() > 0:
        logits_TE = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
        sizes, blocks, grid = _launch(logits_TE)
        options = {"K": top_k, "NORMALIZE": normalize, "COMPUTE": compute_type(logits_TE.dtype)}
        choose_rows[grid](logits_TE, gates_TE, ids_TK, probs_TE, *sizes, **blocks, **options)
    return gates_TE, ids_TK, probs_TE


def launch_backward(
    grad_TE: Tensor,
    probs_TE: Tensor,
    ids_TK: Tensor,
    grad_gates_TE: Tensor | None,
    grad_probs_TE: Tensor | None,
    normalize: bool,
) -> None:
    """Fill `grad_TE` (..., T, E), of any strides but in E, with the gradient of the logits."""
    if probs_TE.numel() > 0:
        sizes, blocks, grid = _launch(grad_TE)
        grads = [probs_TE if grad is None else grad.contiguous() for grad in (grad_gates_TE, grad_probs_TE)]
        given = {"WITH_GATES": grad_gates_TE is not None, "WITH_PROBS": grad_probs_TE is not None}
        options = {"K": ids_TK.shape[-1], "NORMALIZE": normalize, **given}
        choose_rows_backward[grid](probs_TE, ids_TK, *grads, grad_TE, *sizes, **blocks, **options)


def _launch(logits_TE: Tensor) -> tuple[tuple[int, ...], dict[str, int], tuple[int]]:
    """Return N, T and strides of routers and tokens; E and the tile; the grid."""
    T, E = logits_TE.shape[-2:]
    N = logits_TE.numel() // E
    router_stride = logits_TE.stride(0) if logits_TE.dim() == 3 else 0
    block_e = triton.next_power_of_2(E)
    block_n = max(1, TILE // block_e)
    blocks = {"E": E, "BLOCK_N": block_n, "BLOCK_E": block_e}
    return (N, T, router_stride, logits_TE.stride(-2)), blocks, (triton.cdiv(N, block_n),)
