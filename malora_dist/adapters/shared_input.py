"""What linears make together of the one tensor that they all read: computed when the first is called, and kept."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from malora_dist.adapters.input_projection import FusedProjection, InputProjection, ProjectedInput


class Combine(Protocol):
    """Sums of experts on their way back to the ranks of their tokens."""

    def finish(self, base_TO: Tensor) -> Tensor:
        """Wait for the sums, and return them added to the base's output (T, O)."""


class ExpertTokens(Protocol):
    """Tokens on the rank of their experts: rows (N', D) with one gate per local expert, (N', E_local)."""

    @property
    def rows(self) -> Tensor: ...

    @property
    def gates(self) -> Tensor: ...

    def start_combine(self, sums_NO: Tensor) -> Combine:
        """Start to send the experts' sums (N', O) back."""


class Dispatcher(Protocol):
    """Sends tokens to the ranks of their experts."""

    def dispatch(self, inputs: Sequence[ProjectedInput]) -> Sequence[ExpertTokens]:
        """Send the tokens of linears that read one tensor, and return those received by this rank, for each linear."""


Prepared = tuple[ProjectedInput, ExpertTokens | None]


class SharedInput:
    """Projects and dispatches the input of linears that read one tensor (q, k and v; gate and up).

    fused: projects for all of them by one product; otherwise each by its own.
    dispatcher: sends their tokens to the ranks of their experts; None where all experts are here.
    """

    def __init__(self, projections: Sequence[InputProjection], fused: FusedProjection | None = None) -> None:
        self.projections, self.fused = list(projections), fused
        self.dispatcher: Dispatcher | None = None
        self._version: _TensorVersion | None = None
        self._mode = (False, False)
        self._prepared: dict[int, Prepared] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, or a pickle: no tensor of a forward."""
        return self.__dict__ | {"_version": None, "_prepared": {}}

    def take(self, projection: InputProjection, x: Tensor) -> Prepared:
        """Return what was made of x (..., I) for the linear of this projection, once; make it for all if need be."""
        place = next(n for n, each in enumerate(self.projections) if each is projection)
        mode = torch.is_grad_enabled(), projection.training
        if place not in self._prepared or self._mode != mode or self._version is None or not self._version.is_of(x):
            self._version, self._mode, self._prepared = _TensorVersion(x), mode, dict(enumerate(self._prepare(x)))
        prepared = self._prepared.pop(place)
        if not self._prepared:
            self._version = None
        return prepared

    def _prepare(self, x: Tensor) -> list[Prepared]:
        inputs = self._project(x)
        tokens = [None] * len(inputs) if self.dispatcher is None else self.dispatcher.dispatch(inputs)
        return list(zip(inputs, tokens, strict=True))

    def _project(self, x: Tensor) -> list[ProjectedInput]:
        if self.fused is None:
            return [projection.project(x) for projection in self.projections]
        base_TI, hs, routings = self.fused(*self.projections[0].rows_and_keys(x))
        return [ProjectedInput(base_TI, h_TD, routing) for h_TD, routing in zip(hs, routings, strict=True)]


class _TensorVersion:
    """The numbers of a tensor as they are now; kept alive, so that nothing else takes their place."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)

    def is_of(self, other: Tensor) -> bool:
        """Return whether `other` is this memory, unchanged: DeepSpeed's hooks hand modules an alias of their input."""
        tensor = self._tensor
        return (
            tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
            and tensor.storage_offset() == other.storage_offset()
            and tensor.shape == other.shape
            and tensor.stride() == other.stride()
            and self._version == _version(other)
        )


def _version(tensor: Tensor) -> int:
    """Count how often the memory was written to in place; inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
