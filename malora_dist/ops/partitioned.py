"""The size of a parameter of which ZeRO-3 keeps a part on each process, as DeepSpeed's own attributes give it.

Such a parameter holds no element here between its uses. PEFT and transformers read the same attributes.
"""

from typing import Any

from torch import Tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether ZeRO-3 keeps the tensor in parts."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of the tensor before it was partitioned, if it was."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Any) -> int:
    """Return the number of elements of the tensor before it was partitioned, if it was."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))
