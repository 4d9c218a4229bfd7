"""The trained state of an engine as whole tensors under global names, whatever holds it: three kinds of optimizers.

`gather` gives a parameter's weight and, if it is trained, AdamW's moments, by one message at most, shaped like the
parameter before ZeRO-3 split it (a slice of experts stays a slice). `set_weight` and `set_moment` put one back, asking
`read(start, stop)` for the elements of that flat tensor that this process needs. `create` makes moments without an
optimizer step, which would decay weights. Every process must call the methods alike. Weights are fp32 and equal their
fp32 masters between two steps.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.distributed.zero012 import link_optimizer_state
from malora_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[int, int], Tensor]


class OptimizerState(Protocol):
    """Weights and moments of an engine as whole tensors. Every process must call the methods alike."""

    def create(self, step: int) -> None:
        """Make the moments that AdamW would hold after `step` steps, all 0, without a step, which decays weights."""

    def step_count(self) -> int:
        """Return the steps taken, 0 before the first."""

    def gather(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the weight and, if it is trained, the moments, shaped like the parameter before ZeRO-3 split it."""

    def set_weight(self, parameter: nn.Parameter, read: Read) -> None:
        """Set weight and fp32 master from the elements `read(start, stop)` of the flat tensor."""

    def set_moment(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        """Set the moment of this name from the elements `read(start, stop)` of the flat tensor."""


def optimizer_state(engine: Any, zero_stage: int) -> OptimizerState:
    """Return the state of an engine that trains at this ZeRO stage.

    Raises:
        CheckpointError: DeepSpeed keeps the optimizer on NVMe, which is not supported.
    """
    if zero_stage == 0:
        return WholeState(engine.optimizer)
    if zero_stage < 3:
        return FlatState(engine.optimizer)
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise CheckpointError("zero_optimization.offload_optimizer.device=nvme: its state cannot be saved; use cpu")
    return PartitionedState(engine.optimizer)


class WholeState:
    """Stage 0: a plain torch optimizer over whole parameters."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def create(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = _empty_state(parameter, step)

    def step_count(self) -> int:
        return _step_count(self.optimizer)

    def gather(self, parameter: nn.Parameter) -> list[Tensor]:
        moments = [self.optimizer.state[parameter][key] for key in MOMENTS] if parameter.requires_grad else []
        return [parameter.detach(), *moments]

    def set_weight(self, parameter: nn.Parameter, read: Read) -> None:
        parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))

    def set_moment(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        self.optimizer.state[parameter][key].copy_(read(0, parameter.numel()).view(parameter.shape))


class FlatState:
    """Stages 1 and 2: every process has whole weights and a stretch of the flat fp32 masters and moments."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def create(self, step: int) -> None:
        for flat in self.optimizer.single_partition_of_fp32_groups:
            self.optimizer.optimizer.state[flat] = _empty_state(flat, step)
        link_optimizer_state(self.optimizer)

    def step_count(self) -> int:
        return _step_count(self.optimizer.optimizer)

    def gather(self, parameter: Any) -> list[Tensor]:
        if not parameter.requires_grad:
            return [parameter.detach()]
        link_optimizer_state(self.optimizer)
        moments = torch.zeros(len(MOMENTS), parameter.numel(), dtype=torch.float32, device=parameter.device)
        mapping = parameter._hp_mapping
        if mapping is not None:
            place = mapping.lp_fragment_address
            for row, key in zip(moments, MOMENTS, strict=True):
                row[place.start : place.start + place.numel] = mapping.get_hp_fragment(key)
        dist.all_reduce(moments, group=parameter._dp_group)
        return [parameter.detach(), *(row.view(parameter.shape) for row in moments)]

    def set_weight(self, parameter: nn.Parameter, read: Read) -> None:
        parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))
        if parameter.requires_grad:
            self._set(parameter, None, read)

    def set_moment(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        self._set(parameter, key, read)

    @staticmethod
    def _set(parameter: Any, key: str | None, read: Read) -> None:
        mapping = parameter._hp_mapping
        if mapping is not None:
            place = mapping.lp_fragment_address
            mapping.get_hp_fragment(key).data.copy_(read(place.start, place.start + place.numel))


class PartitionedState:
    """Stage 3: every process keeps its part of each parameter, master and moment."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def create(self, step: int) -> None:
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            self.optimizer.optimizer.state[flat] = _empty_state(flat, step)

    def step_count(self) -> int:
        return _step_count(self.optimizer.optimizer)

    def gather(self, parameter: Any) -> list[Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                return [parameter.detach().clone()]
        moments = [safe_get_local_optimizer_state(parameter, key) for key in MOMENTS]
        # Where they are offloaded they wait on the CPU.
        own = torch.stack([part.to(parameter.device) for part in (safe_get_local_fp32_param(parameter), *moments)])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(parameter.ds_process_group))]
        dist.all_gather(parts, own, group=parameter.ds_process_group)
        whole = torch.cat(parts, dim=1)[:, : parameter.ds_numel]
        return [row.view(parameter.ds_shape) for row in whole]

    def set_weight(self, parameter: Any, read: Read) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank(parameter.ds_process_group) == 0:
                parameter.data.copy_(read(0, parameter.ds_numel).view(parameter.ds_shape))
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, _part(parameter, read))

    def set_moment(self, parameter: nn.Parameter, key: str, read: Read) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, _part(parameter, read), key)


def _part(parameter: Any, read: Read) -> Tensor:
    """Read this process's part, filled up with zeros: DeepSpeed's own setter of whole tensors fails on uneven parts."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    start, stop = (min(edge * size, parameter.ds_numel) for edge in (rank, rank + 1))
    part = torch.zeros(size, dtype=torch.float32)
    part[: stop - start] = read(start, stop)
    return part


def _empty_state(parameter: Tensor, step: int) -> dict[str, Tensor]:
    """Return what AdamW would hold after `step` steps, but for the moments' values."""
    zeros = {key: torch.zeros_like(parameter.data) for key in MOMENTS}
    return {"step": torch.full((), float(step), device=parameter.device), **zeros}


def _step_count(optimizer: torch.optim.Optimizer) -> int:
    """Return the steps taken, 0 before the first. Raises CheckpointError if parts of the optimizer disagree."""
    steps = [torch.as_tensor(state["step"]) for state in optimizer.state.values() if "step" in state]
    counts = sorted(set(torch.stack(steps).long().tolist())) if steps else []
    if len(counts) > 1:
        raise CheckpointError(f"parts of the optimizer have taken different numbers of steps: {counts}")
    return counts[0] if counts else 0
