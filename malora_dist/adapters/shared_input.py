"""What several layers make together of the one tensor they all read."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part")


class SharedInput(Generic[Part]):
    """Parts for layers that read one tensor (q, k and v; gate and up): whichever is asked first computes for all.

    `compute` takes the tensor and gives one part for each of `layers`, in their order.
    """

    def __init__(self, layers: Sequence[nn.Module], compute: Callable[[Tensor], Sequence[Part]]) -> None:
        self._layers, self._compute = list(layers), compute
        self._input: _TensorVersion | None = None
        self._mode = (False, False)
        self._parts: dict[int, Part] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, or a pickle: no tensor of a forward."""
        return self.__dict__ | {"_input": None, "_parts": {}}

    def take(self, layer: nn.Module, x: Tensor) -> Part:
        """This layer's part, once."""
        place = next(n for n, each in enumerate(self._layers) if each is layer)
        mode = torch.is_grad_enabled(), layer.training
        if place not in self._parts or self._mode != mode or self._input is None or not self._input.holds(x):
            self._input, self._mode, self._parts = _TensorVersion(x), mode, dict(enumerate(self._compute(x)))
        part = self._parts.pop(place)
        if not self._parts:
            self._input = None
        return part


class _TensorVersion:
    """The numbers of a tensor as they are now; kept alive, so that nothing else takes their place."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)

    def holds(self, other: Tensor) -> bool:
        """Whether `other` is the same numbers in memory: DeepSpeed's hooks hand each module an alias of its input."""
        tensor = self._tensor
        return (
            tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
            and tensor.storage_offset() == other.storage_offset()
            and tensor.shape == other.shape
            and tensor.stride() == other.stride()
            and self._version == _version(other)
        )


def _version(tensor: Tensor) -> int:
    """How often the memory was written to in place; inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
