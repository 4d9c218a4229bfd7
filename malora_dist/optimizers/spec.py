"""What the package must know of an optimizer to train, save, resume and plan with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Shape = tuple[int, ...]
FP32 = 4


class StateLayout(Protocol):
    """What an optimizer keeps for each tensor that it updates, and how a checkpoint holds it: as named fp32 tensors.

    elementwise: whether each of them has one number for each element of the tensor, which any split of the tensor
        splits alike. Such states go on at any ZeRO stage, number of processes and ep_size.
    """

    elementwise: ClassVar[bool]

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Return name and shape of each tensor that a checkpoint holds for a trained tensor of `shape`."""

    def read(self, state: Mapping[str, Any], start: int, stop: int) -> "dict[str, Tensor]":
        """Return the fp32 tensors of `optimizer.state[tensor]`, flat, for the elements [start, stop) of that tensor.

        A layout that is not elementwise gets the whole tensor and returns whole tensors.
        """

    def write(self, optimizer: Any, tensor: "Tensor", step: int, values: "dict[str, Tensor]") -> None:
        """Set `optimizer.state[tensor]` to what it was after `step` steps. `values` are shaped as `shapes` says."""

    def num_bytes(self, shape: Shape) -> int:
        """Return the bytes of the state of a tensor of `shape` in memory, without counters."""


@dataclass(frozen=True)
class Elementwise:
    """fp32 tensors of the trained tensor's shape, under the names that `optimizer.state[tensor]` has them.

    step: how `optimizer.state[tensor]["step"]` counts: an fp32 tensor as in torch, an int, or not at all.
    """

    names: tuple[str, ...]
    step: Literal["tensor", "int", "none"] = "tensor"
    elementwise: ClassVar[bool] = True

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        return dict.fromkeys(self.names, shape)

    def read(self, state: Mapping[str, Any], start: int, stop: int) -> "dict[str, Tensor]":
        return {name: state[name].detach().reshape(-1)[start:stop] for name in self.names}

    def write(self, optimizer: Any, tensor: "Tensor", step: int, values: "dict[str, Tensor]") -> None:
        state: dict[str, Any] = {}
        if self.step == "tensor":
            state["step"] = step_tensor(step, tensor)
        if self.step == "int":
            state["step"] = step
        optimizer.state[tensor] = state | values

    def num_bytes(self, shape: Shape) -> int:
        return FP32 * len(self.names) * math.prod(shape)


def step_tensor(step: int, tensor: "Tensor") -> "Tensor":
    """Return the counter of torch's fused and capturable optimizers: a number on the tensor's device."""
    import torch

    return torch.full((), float(step), device=tensor.device)


def _zero_settings() -> dict[str, Any]:
    return {"zero_allow_untested_optimizer": True}


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """One optimizer.

    name: value of `train.optim`, as transformers calls it. aliases: other names for the same.
    kind: what checkpoints call it.
    label: its name in messages. state_label: what `malora plan` calls its state.
    description: half a sentence for the recipe's reference.
    build: makes it of parameter groups and the keywords lr, betas, eps and weight_decay.
    layout: its state.
    group_keys: settings of a parameter group that a checkpoint holds and a resumed run must have alike.
    deepspeed: settings of DeepSpeed that it needs at ZeRO-1 and higher.
    zero_stages: stages at which it computes the same as on whole tensors, which it is allowed at.
    expert_slices: whether it may update a process's slice of the experts alone (parallel.ep_size above 1).
    rule: why it is refused at other stages, or with slices.
    devices: types of devices it runs on; empty for all.
    inapplicable: keys of the section `train` that it does not read.
    """

    name: str
    kind: str
    label: str
    state_label: str
    description: str
    build: "Callable[..., Optimizer]"
    layout: StateLayout
    group_keys: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    deepspeed: Mapping[str, Any] = field(default_factory=_zero_settings)
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    expert_slices: bool = True
    rule: str = ""
    devices: tuple[str, ...] = ()
    inapplicable: tuple[str, ...] = ()
