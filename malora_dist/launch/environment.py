"""Variables of a process for its memory: how the allocator of GPU memory works."""

from collections.abc import Mapping

ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLDER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def allocator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return PYTORCH_ALLOC_CONF for processes with a GPU; nothing if it, or the older PYTORCH_CUDA_ALLOC_CONF, is set.

    Every micro-batch has another number of tokens. With segments that grow, memory freed in one size serves the next.
    """
    if ALLOCATOR in environment or OLDER_ALLOCATOR in environment:
        return {}
    return {ALLOCATOR: "expandable_segments:True"}
