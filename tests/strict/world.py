"""Processes that believe to have a GPU each: DeepSpeed, its ZeRO stages and process groups on the device `strict`.

Groups made without a backend behave as NCCL's do (contiguous tensors of the device only), those made with
backend="gloo" take tensors of the host only; all messages travel by gloo.
"""

import os
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from malora_dist.bench.strict.backend import register
from malora_dist.bench.strict.device import TYPE, StrictDevice
from malora_dist.distributed import process_groups as groups
from malora_dist.distributed.process_groups import World


class StrictAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """The device as DeepSpeed sees it; what is not here is the CPU's."""

    def __init__(self) -> None:
        super().__init__()
        self._name = TYPE
        self.module = torch.strict  # type: ignore[attr-defined]

    def is_synchronized_device(self) -> bool:
        return False

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def device_name(self, device_index: int | None = None) -> str:
        return TYPE if device_index is None else f"{TYPE}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return self.module.device(device_index)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{TYPE}:0"

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        self.module.synchronize()

    @property
    def Stream(self) -> Any:
        return self.module.Stream

    @property
    def Event(self) -> Any:
        return self.module.Event

    def stream(self, stream: Any) -> Any:
        return self.module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return self.module.current_stream()

    default_stream = current_stream

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        state: torch.Tensor = self.module.get_rng_state()
        return state

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        self.module.set_rng_state(new_state)

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == TYPE

    @property
    def FloatTensor(self) -> Any:
        return partial(torch.tensor, dtype=torch.float32, device=TYPE)

    @property
    def ByteTensor(self) -> Any:
        return partial(torch.tensor, dtype=torch.uint8, device=TYPE)

    @property
    def IntTensor(self) -> Any:
        return partial(torch.tensor, dtype=torch.int32, device=TYPE)

    @property
    def LongTensor(self) -> Any:
        return partial(torch.tensor, dtype=torch.int64, device=TYPE)


def become_a_gpu() -> StrictDevice:
    """Make DeepSpeed, process groups and `start_processes` of this process those of the device, for good."""
    register()
    set_accelerator(StrictAccelerator())
    device = StrictDevice()
    _become_nccl(device)
    groups.start_processes = start_processes  # type: ignore[assignment]
    return device


def _become_nccl(device: StrictDevice) -> None:
    c10d: Any = dist.distributed_c10d
    new_group = dist.new_group

    def recorded(*arguments: Any, backend: str | None = None, **settings: Any) -> Any:
        group = new_group(*arguments, backend=backend, **settings)
        if backend == "gloo":
            device.host_groups.append(group)
        return group

    def object_device(group: Any = None) -> str:
        return "cpu" if any(group is each for each in device.host_groups) else f"{TYPE}:0"

    dist.new_group = c10d.new_group = recorded
    c10d._get_object_coll_device = object_device


def start_processes(timeout_seconds: float) -> World:
    """As `malora_dist.distributed.process_groups.start_processes` with a GPU."""
    # Otherwise DeepSpeed compiles an operator for inference on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=timeout_seconds), verbose=False)
    control = dist.new_group(backend="gloo")
    groups.set_timeouts(timeout_seconds)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), torch.device(TYPE, 0), control)
