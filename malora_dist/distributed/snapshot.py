"""An engine's trained state to and from whole tensors in host memory, layer by layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.adapters.inject import adapter_parameters
from malora_dist.distributed.optimizer_state import MOMENTS, OptimizerState
from malora_dist.distributed.process_groups import raise_on_all_ranks
from malora_dist.distributed.zero012 import is_slice
from malora_dist.distributed.zero3 import gather_experts
from malora_dist.errors import CheckpointError

# kind ("adapter" or "optimizer"), name in that kind, first and last element -> the elements
ReadElements = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True)
class Whole:
    """An adapter tensor as a checkpoint has it. `first` is where this process's slice of it begins, in elements."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    first: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its weight and, if it is trained, its moments."""
        tensors = 1 + len(MOMENTS) if self.parameter.requires_grad else 1
        return 4 * tensors * int(torch.Size(self.shape).numel())


def whole_tensors(model: nn.Module) -> list[Whole]:
    """Return every adapter tensor, in the order of the model, the same on every process but for `first`."""
    return [_whole(name, parameter) for name, parameter in adapter_parameters(model)]


def _whole(name: str, parameter: Any) -> Whole:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if not is_slice(parameter):
        return Whole(name, parameter, shape, 0)
    group = _expert_ranks(parameter)
    local = int(torch.Size(shape).numel())
    return Whole(name, parameter, (shape[0] * dist.get_world_size(group), *shape[1:]), dist.get_rank(group) * local)


def _expert_ranks(parameter: Any) -> Any:
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(parameter.group_name)


def snapshot(
    tensors: list[Whole], state: OptimizerState, keep: Callable[[str], bool]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, whole fp32 tensor on the CPU) of the adapter tensors for which `keep(name)` holds here.

    All processes gather one tensor at a time, and none holds more than those it keeps. Every one must take part to the
    end.
    """
    for whole in tensors:
        gathered = [gather_experts(whole.parameter, tensor) for tensor in state.gather(whole.parameter)]
        if keep(whole.name):
            kinds = [("adapter", whole.name), *(("optimizer", f"{key}.{whole.name}") for key in MOMENTS)]
            # One copy for all of them, as each makes the host wait.
            copies = torch.stack(gathered).to("cpu", torch.float32)
            yield from ((*kind, tensor) for kind, tensor in zip(kinds, copies, strict=False))


def restore(tensors: list[Whole], state: OptimizerState, step: int, read: ReadElements) -> None:
    """Put weights, masters and moments back, each process its part, as they were after `step` optimizer steps.

    Raises on every process alike the CheckpointError that `read` raised on one of them.
    """
    errors: list[CheckpointError] = []

    def elements(kind: str, name: str, first: int, start: int, stop: int) -> Tensor:
        try:
            return read(kind, name, first + start, first + stop)
        except CheckpointError as error:
            # Others are in the middle of the same tensor and must not wait for this process.
            errors.append(error)
            return torch.zeros(stop - start)

    state.create(step)
    for whole in tensors:
        state.set_weight(whole.parameter, partial(elements, "adapter", whole.name, whole.first))
        if whole.parameter.requires_grad:
            for key in MOMENTS:
                place = partial(elements, "optimizer", f"{key}.{whole.name}", whole.first)
                state.set_moment(whole.parameter, key, place)
    raise_on_all_ranks(errors[0] if errors else None)
