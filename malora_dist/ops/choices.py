"""Choices that follow from sizes alone, by counting: the form of the experts' sum, of attention, the loss's chunks.

Needs no torch: `malora plan` counts with the same rules.
"""

# Multiplications in a GEMM that cost a CPU as much as moving a number: measured, the forms break even near E*R = 500 at
# K = 2.
MOVE_COST = 128

VARLEN = ("varlen", "flash_attention_2")
MAX_VARLEN_HEAD_DIM = 256

# Bytes of a chunk's fp32 logits. On a CPU the passes over a chunk should find some of it in the last cache, while each
# chunk reads the whole weight twice more: 64 MiB (341 rows of 49152) was fast on an idle and on a busy machine. A GPU
# needs some hundred rows to multiply at full rate, whatever the vocabulary: 256 MiB are 523 rows even of 128256.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}


def prefer_grouped(num_experts: int, top_k: int, r: int, in_width: int, out_width: int) -> bool:
    """Return whether `grouped_experts` is the cheaper form on a CPU, by counting the work of a token.

    Both forms spend R (D + O) multiplications per expert they compute. Grouped computes K of E, but moves K rows of
    D + O numbers there and back, each at `MOVE_COST`.

    Args:
        num_experts, top_k, r, in_width, out_width: E, K, R, D and O.
    """
    dense = num_experts * r * (in_width + out_width)
    grouped = top_k * r * (in_width + out_width) + MOVE_COST * top_k * (in_width + 2 * out_width)
    return grouped < dense


def fits_varlen(head_dim: int) -> bool:
    """Return whether varlen kernels take heads of this width: PyTorch's do not pad them to a multiple of 8."""
    return head_dim <= MAX_VARLEN_HEAD_DIM and head_dim % 8 == 0


def attention_on_cuda(requested: str, itemsize: int, head_dim: int) -> str:
    """Resolve `auto` on a GPU: `varlen` for numbers of 2 bytes and heads that its kernels take, else `sdpa`."""
    if requested != "auto":
        return requested
    return "varlen" if itemsize == 2 and fits_varlen(head_dim) else "sdpa"


def chunk_rows(vocab_size: int, device: str) -> int:
    """Return how many rows of logits the loss computes at a time, at least one.

    Args:
        vocab_size: numbers of a row.
        device: a kind of device (`torch.device.type`).
    """
    budget = CHUNK_BYTES["cpu" if device == "cpu" else "cuda"]
    return max(1, budget // (4 * vocab_size))
