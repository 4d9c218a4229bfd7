"""Types that Triton kernels compute in. Imported only where kernels run; triton is an optional dependency."""

import torch
import triton.language as tl


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type for arithmetic on numbers of `dtype`: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32
