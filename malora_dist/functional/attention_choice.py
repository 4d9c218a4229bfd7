"""Which attention suits packed rows on CUDA. Needs no torch."""

VARLEN = ("varlen", "flash_attention_2")
MAX_VARLEN_HEAD_DIM = 256


def attention_on_cuda(requested: str, itemsize: int, head_dim: int) -> str:
    """Say what `auto` is on a GPU: `varlen` for numbers of 2 bytes and heads of at most 256, which have kernels."""
    if requested != "auto":
        return requested
    return "varlen" if itemsize == 2 and head_dim <= MAX_VARLEN_HEAD_DIM else "sdpa"
