"""Process groups: start them, give every one of them the run's timeout, and reduce over all processes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.errors import MaloraError, TopologyError
from malora_dist.launch.command import VISIBLE_DEVICES, refuses_gpus
from malora_dist.launch.environment import allocator_variables
from malora_dist.launch.network_interface import interface_variables
from malora_dist.launch.ports import free_port
from malora_dist.launch.ranks import rank_variables
from malora_dist.launch.schedulers import hides_other_devices

NOTE = "malora_dist/told"


@dataclass(frozen=True)
class World:
    """This process's place among all processes, and its device.

    `control` is a group for messages between hosts that must not wait for devices; None is the default group.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_processes(timeout_seconds: float) -> World:
    """Join the process group that `deepspeed`, `torchrun` or `srun` describe in the environment; alone without them.

    Every collective of every group fails after `timeout_seconds` instead of hanging. Raises TopologyError if the
    environment describes no run that can start.
    """
    os.environ.update(rank_variables(os.environ) or _alone())
    # Read when the first memory of a GPU is taken.
    os.environ.update(allocator_variables(os.environ))
    os.environ.update(interface_variables(os.environ))
    local_rank = int(os.environ["LOCAL_RANK"])
    if _takes_a_gpu():
        if torch.cuda.device_count() == 1 and hides_other_devices(os.environ):
            local_rank = 0
            os.environ["LOCAL_RANK"] = "0"
        elif local_rank >= torch.cuda.device_count():
            raise TopologyError(
                f"LOCAL_RANK={local_rank}: this node has {torch.cuda.device_count()} visible GPUs and more processes; "
                "start as many on each node as it has GPUs (with srun: --ntasks-per-node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        # DeepSpeed probes for accelerators with a warning unless told.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles an operator for inference that training never calls, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_seconds), verbose=False)
    control = dist.new_group(backend="gloo") if device.type == "cuda" else None
    set_timeouts(timeout_seconds)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, control)


def _takes_a_gpu() -> bool:
    """Return whether this process computes on a GPU; where DS_ACCELERATOR=cpu refuses them, hide them from now on."""
    if refuses_gpus(os.environ):
        # The deepspeed launcher has named devices all the same, and libraries would take them.
        os.environ.update(dict.fromkeys(VISIBLE_DEVICES, ""))
        return False
    return torch.cuda.is_available()


def _alone() -> dict[str, str]:
    """Return what a launcher would say to a single process, whatever is left of others in the environment."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def set_timeouts(timeout_seconds: float) -> None:
    """Give every existing group the timeout: `new_group` ignores the one given to `init_distributed`."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def group_timeouts() -> list[float]:
    """Timeout in seconds of every backend of every group of this process."""
    from torch.distributed.distributed_c10d import _world

    backends = [group._get_backend(device) for group in _world.pg_map for device in group._device_types]
    return [backend.options._timeout.total_seconds() for backend in backends]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    dist.all_reduce(tensor)
    return tensor


def max_over_processes(tensor: Tensor) -> Tensor:
    """The maximum of a tensor over all processes, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def max_over_control(values: Sequence[int], world: World) -> list[int]:
    """The maximum of each number over all processes, without a word to the devices."""
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=world.control)
    result: list[int] = tensor.tolist()
    return result


def tell_all() -> None:
    """Leave a note that every process can find with `told` whenever it looks, in step with the others or not."""
    dist.distributed_c10d._get_default_store().set(NOTE, "1")


def told() -> bool:
    """Whether a process has left the note."""
    found: bool = dist.distributed_c10d._get_default_store().check([NOTE])
    return found


def from_main(value: Any) -> Any:
    """The main process's value, on all of them."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Any], world: World) -> Any:
    """What `work` gives on the main process, on all of them; a MaloraError it raises there is raised on all."""
    value, error = None, None
    if world.is_main:
        try:
            value = work()
        except MaloraError as caught:
            error = caught
    value, error = from_main((value, error))
    if error is not None:
        raise error
    return value


def fail_together(error: MaloraError | None) -> None:
    """Raise, on every process alike, the error that one of them has met; that of the lowest rank if several have."""
    errors = [found for found in gather_lists([error]) if found is not None]
    if errors:
        raise errors[0]


def gather_lists(values: list[Any]) -> list[Any]:
    """All processes' lists, one after another in the order of ranks."""
    parts: list[list[Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts if part is not None for value in part]


def broadcast_values(parameters: Sequence[nn.Parameter], source: int, group: Any = None) -> None:
    """Give all processes of a group the values that rank `source` has, whatever their dtype and order in memory."""
    for parameter in parameters:
        # NCCL takes contiguous tensors only, and not every dtype.
        data = parameter.data
        values = data.contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), src=source, group=group)
        if values is not data:
            data.copy_(values)


def replicate(parameters: list[nn.Parameter]) -> None:
    """Placement for ZeRO below stage 3: every process gets the main process's values."""
    broadcast_values(parameters, source=0)


def wait_for_all() -> None:
    """Return when every process is here."""
    dist.barrier()


def stop_processes() -> None:
    """Leave all process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
