"""An engine's trained state to and from whole tensors in host memory, layer by layer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.distributed.expert_groups import expert_parallel_group, is_slice
from malora_dist.distributed.optimizer_state import OptimizerState
from malora_dist.distributed.rank_errors import raise_on_all_ranks
from malora_dist.distributed.zero3 import gather_experts
from malora_dist.ops.partitioned import whole_shape
from malora_dist.optimizers.registry import DEFAULT, optimizer_spec
from malora_dist.optimizers.spec import OptimizerSpec, Shape

# kind ("adapter" or "optimizer"), name in that kind, first and last element -> the elements
ReadElements = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True)
class Whole:
    """An adapter tensor as a checkpoint has it.

    first: where this process's slice of it begins, in elements.
    states: names and shapes of the tensors of its optimizer state; none if it is not trained.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    first: int
    states: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its weight and its optimizer state, in fp32."""
        return 4 * sum(math.prod(shape) for shape in (self.shape, *self.states.values()))


def whole_tensors(model: nn.Module, optim: str = DEFAULT) -> list[Whole]:
    """Return every adapter tensor, in the order of the model, the same on every process but for `first`."""
    spec = optimizer_spec(optim)
    return [_whole(name, parameter, spec) for name, parameter in adapter_parameters(model)]


def _whole(name: str, parameter: Any, spec: OptimizerSpec) -> Whole:
    shape, first = whole_shape(parameter), 0
    if is_slice(parameter):
        group = expert_parallel_group(parameter)
        first = dist.get_rank(group) * math.prod(shape)
        shape = (shape[0] * dist.get_world_size(group), *shape[1:])
    return Whole(name, parameter, shape, first, spec.layout.shapes(shape) if parameter.requires_grad else {})


def snapshot(
    tensors: list[Whole], state: OptimizerState, keep: Callable[[str], bool]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, whole fp32 tensor on the CPU) of adapter tensors for which `keep(name)` is true on this rank.

    All processes gather one tensor at a time, and none holds more than those it keeps. Every one must take part to the
    end.
    """
    for whole in tensors:
        gathered = [gather_experts(whole.parameter, tensor) for tensor in state.gather(whole.parameter)]
        if keep(whole.name):
            kinds = [("adapter", whole.name), *(("optimizer", f"{key}.{whole.name}") for key in whole.states)]
            yield from ((*kind, tensor) for kind, tensor in zip(kinds, _on_cpu(gathered), strict=True))


def _on_cpu(tensors: list[Tensor]) -> Iterable[Tensor]:
    """Copy by one message, as each makes the host wait."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to("cpu", torch.float32)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def restore(tensors: list[Whole], state: OptimizerState, step: int, read: ReadElements) -> None:
    """Put weights, masters and optimizer states back, each process its part, as they were after `step` optimizer steps.

    Raises on every process what `read` raised on one of them.
    """
    errors: list[Exception] = []

    def elements(kind: str, name: str, first: int, start: int, stop: int) -> Tensor:
        try:
            return read(kind, name, first + start, first + stop)
        except Exception as error:
            # Others are in the middle of the same tensor and must not wait for this process.
            errors.append(error)
            return torch.zeros(stop - start)

    state.begin()
    for whole in tensors:
        state.set_weight(whole.parameter, partial(elements, "adapter", whole.name, whole.first))
        for key in whole.states:
            place = partial(elements, "optimizer", f"{key}.{whole.name}", whole.first)
            state.set_state(whole.parameter, key, place)
    state.finish(step)
    raise_on_all_ranks(errors[0] if errors else None)
