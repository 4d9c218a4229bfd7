"""The trained state of an engine as whole tensors under global names, whatever holds it: three kinds of optimizers.

`gather` gives a parameter's weight and, if it is trained, the tensors of its optimizer state in the order of
`layout.shapes`, by one message at most, shaped like the parameter before ZeRO-3 split it (a slice of experts stays a
slice). `set_weight` and `set_state` put one back, asking `read(start, stop)` for the elements of that flat tensor that
this process needs. States are put back between `begin` and `finish`, which makes them without an optimizer step, which
would decay weights. Every process must call the methods alike. Weights are fp32 and equal their fp32 masters between
two steps.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from malora_dist.distributed.zero012 import add_up_parts, flat_parts, part_of
from malora_dist.distributed.zero3 import flat_masters, flat_place, gather_parts, own_part, partition_rank
from malora_dist.errors import CheckpointError
from malora_dist.ops.partitioned import whole_numel, whole_shape
from malora_dist.optimizers.registry import DEFAULT, optimizer_spec
from malora_dist.optimizers.spec import OptimizerSpec

Read = Callable[[int, int], Tensor]


class OptimizerState(Protocol):
    """Weights and states of an engine as whole tensors. Every process must call the methods alike."""

    spec: OptimizerSpec

    def begin(self) -> None:
        """Make zeros for the values of all states, which `set_state` replaces."""

    def finish(self, step: int) -> None:
        """Make the states, as they were after `step` steps, of the values, without a step, which decays weights."""

    def step_count(self) -> int | None:
        """Return the steps taken, 0 before the first, None if the optimizer does not count them."""

    def gather(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the weight and, if it is trained, its states, shaped like the parameter before ZeRO-3 split it."""

    def set_weight(self, parameter: nn.Parameter, read: Read) -> None:
        """Set weight and fp32 master from the elements `read(start, stop)` of the flat tensor."""

    def set_state(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        """Set the value of the state of this name from the elements `read(start, stop)` of the flat tensor."""


def optimizer_state(engine: Any, zero_stage: int, optim: str = DEFAULT) -> OptimizerState:
    """Return the state of an engine that trains at this ZeRO stage with the optimizer `optim`.

    Raises:
        CheckpointError: DeepSpeed keeps the optimizer on NVMe, which is not supported.
    """
    spec = optimizer_spec(optim)
    assert zero_stage == 0 or spec.layout.elementwise, f"{optim} cannot be saved in flat parts"
    if zero_stage == 0:
        return WholeState(engine.optimizer, spec)
    if zero_stage < 3:
        return FlatState(engine.optimizer, spec)
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise CheckpointError("zero_optimization.offload_optimizer.device=nvme: its state cannot be saved; use cpu")
    return PartitionedState(engine.optimizer, spec)


class _HeldState:
    """The states of the tensors that a torch optimizer updates: parameters, or flat parts of many.

    values: what is to become the states, by tensor and name, between `begin` and `finish`.
    """

    def __init__(self, optimizer: Any, tensors: Iterable[Tensor], spec: OptimizerSpec) -> None:
        self.optimizer, self.tensors, self.spec = optimizer, list(tensors), spec
        self.values: dict[Tensor, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Make zeros for the values of all states."""
        for tensor in self.tensors:
            shapes, on = self.spec.layout.shapes(tuple(tensor.shape)), tensor.device
            self.values[tensor] = {k: torch.zeros(s, dtype=torch.float32, device=on) for k, s in shapes.items()}

    def finish(self, step: int) -> None:
        """Make the states, as they were after `step` steps, of the values."""
        for tensor in self.tensors:
            self.spec.layout.write(self.optimizer, tensor, step, self.values.pop(tensor))

    def read(self, tensor: Tensor, start: int, stop: int) -> list[Tensor]:
        """Return the state of the elements [start, stop) of a tensor, in the order of `layout.shapes`."""
        found = self.spec.layout.read(self.optimizer.state[tensor], start, stop)
        return [found[name] for name in self.spec.layout.shapes(tuple(tensor.shape))]

    def step_count(self) -> int | None:
        """Return the steps taken, 0 before the first, None if the optimizer does not count them.

        Raises CheckpointError if parts of the optimizer disagree.
        """
        states = self.optimizer.state.values()
        steps = [torch.as_tensor(state["step"]) for state in states if "step" in state]
        counts = sorted(set(torch.stack(steps).long().tolist())) if steps else []
        if len(counts) > 1:
            raise CheckpointError(f"parts of the optimizer have taken different numbers of steps: {counts}")
        if not counts and any(states):
            return None
        return counts[0] if counts else 0


class WholeState(_HeldState):
    """Stage 0: a plain torch optimizer over whole parameters."""

    def __init__(self, optimizer: Any, spec: OptimizerSpec) -> None:
        super().__init__(optimizer, [p for group in optimizer.param_groups for p in group["params"]], spec)

    def gather(self, parameter: nn.Parameter) -> list[Tensor]:
        states = self.read(parameter, 0, parameter.numel()) if parameter.requires_grad else []
        shapes = self.spec.layout.shapes(tuple(parameter.shape)).values()
        return [parameter.detach(), *(state.view(shape) for state, shape in zip(states, shapes, strict=False))]

    def set_weight(self, parameter: nn.Parameter, read: Read) -> None:
        parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))

    def set_state(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        value = self.values[parameter][key]
        value.copy_(read(0, value.numel()).view(value.shape))


class FlatState(_HeldState):
    """Stages 1 and 2: every process has whole weights and a stretch of the flat fp32 masters and states."""

    def __init__(self, optimizer: Any, spec: OptimizerSpec) -> None:
        parts = flat_parts(optimizer)
        super().__init__(optimizer.optimizer, [part for part, _ in parts], spec)
        self.flat = {parameter: part for part, parameters in parts for parameter in parameters}

    def gather(self, parameter: Any) -> list[Tensor]:
        if not parameter.requires_grad:
            return [parameter.detach()]
        names = self.spec.layout.shapes(tuple(parameter.shape))
        states = torch.zeros(len(names), parameter.numel(), dtype=torch.float32, device=parameter.device)
        first, start, numel = part_of(parameter)
        if numel:
            own = self.read(self.flat[parameter], first, first + numel)
            for whole, part in zip(states, own, strict=True):
                whole[start : start + numel] = part
        add_up_parts(parameter, states)
        return [parameter.detach(), *(state.view(parameter.shape) for state in states)]

    def set_weight(self, parameter: Any, read: Read) -> None:
        parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))
        if parameter.requires_grad:
            self._set(self.flat[parameter].data, parameter, read)

    def set_state(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        self._set(self.values[self.flat[parameter]][key], parameter, read)

    @staticmethod
    def _set(flat: Tensor, parameter: nn.Parameter, read: Read) -> None:
        first, start, numel = part_of(parameter)
        if numel:
            flat[first : first + numel].copy_(read(start, start + numel))


class PartitionedState(_HeldState):
    """Stage 3: every process keeps its part of each parameter, master and state."""

    def __init__(self, optimizer: Any, spec: OptimizerSpec) -> None:
        super().__init__(optimizer.optimizer, flat_masters(optimizer), spec)
        self.zero_optimizer = optimizer

    def gather(self, parameter: Any) -> list[Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_local_fp32_param

        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                return [parameter.detach().clone()]
        flat, first, numel = flat_place(self.zero_optimizer, parameter)
        states = self.read(flat, first, first + numel)
        # Where they are offloaded they wait on the CPU.
        own = torch.stack([part.to(parameter.device) for part in (safe_get_local_fp32_param(parameter), *states)])
        return gather_parts(parameter, own)

    def set_weight(self, parameter: Any, read: Read) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if partition_rank(parameter) == 0:
                parameter.data.copy_(read(0, whole_numel(parameter)).view(whole_shape(parameter)))
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, _part(parameter, read))

    def set_state(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        flat, first, numel = flat_place(self.zero_optimizer, parameter)
        self.values[flat][key][first : first + numel].copy_(_part(parameter, read))


def _part(parameter: Any, read: Read) -> Tensor:
    """Read this process's part, filled up with zeros: DeepSpeed's own setter of whole tensors fails on uneven parts."""
    start, stop, size = own_part(parameter)
    part = torch.zeros(size, dtype=torch.float32)
    part[: stop - start] = read(start, stop)
    return part
