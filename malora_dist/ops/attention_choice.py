"""Which attention suits packed rows on CUDA. Needs no torch."""

VARLEN = ("varlen", "flash_attention_2")
MAX_VARLEN_HEAD_DIM = 256


def fits_varlen(head_dim: int) -> bool:
    """Return whether varlen kernels take heads of this width: PyTorch's do not pad them to a multiple of 8."""
    return head_dim <= MAX_VARLEN_HEAD_DIM and head_dim % 8 == 0


def attention_on_cuda(requested: str, itemsize: int, head_dim: int) -> str:
    """Return what `auto` is on a GPU: `varlen` for numbers of 2 bytes and heads that its kernels take, else `sdpa`."""
    if requested != "auto":
        return requested
    return "varlen" if itemsize == 2 and fits_varlen(head_dim) else "sdpa"
