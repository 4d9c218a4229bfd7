"""Process groups: start and stop them, set their timeouts, and reduce, gather and broadcast over all processes."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.console.progress import log_line
from malora_dist.errors import TopologyError, TrainingError
from malora_dist.launch.command import VISIBLE_DEVICES, refuses_gpus
from malora_dist.launch.environment import allocator_variables
from malora_dist.launch.network_interface import interface_variables
from malora_dist.launch.ports import free_port
from malora_dist.launch.ranks import LAUNCHED, rank_variables
from malora_dist.launch.schedulers import hides_other_devices

STOP_KEY = "malora_dist/stop"
PATIENCE_SECONDS = 20


@dataclass(frozen=True)
class World:
    """This process's rank among all processes, and its device.

    Attributes:
        rank, size, local_rank: as torch.distributed and launchers count them.
        device: where this process computes.
        control: a group for messages between hosts that must not wait for devices; None is the default group.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes and prints for all."""
        return self.rank == 0


def start_processes(timeout_seconds: float) -> World:
    """Join the process group that `deepspeed`, `torchrun` or `srun` describe in the environment; alone without them.

    Args:
        timeout_seconds: after which every collective of every group fails instead of hanging.

    Returns:
        This process's rank and device.

    Raises:
        TopologyError: the environment describes no run that can start.
        TrainingError: the other processes have not come within the timeout.
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
    with joining():
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout_seconds), verbose=False)
    control = dist.new_group(backend="gloo") if device.type == "cuda" else None
    set_timeouts(timeout_seconds)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, control)


@contextmanager
def joining() -> Iterator[None]:
    """Say which other processes are waited for, after a while, and where they have not come."""
    place = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHED)
    waiting = threading.Timer(PATIENCE_SECONDS, log_line, [f"waiting for the other processes of this run ({place})"])
    waiting.daemon = True
    waiting.start()
    try:
        yield
    except dist.DistError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise TrainingError(
            f"the processes of this run have not come together ({place}): {why}. Either another one failed, or these "
            "variables are left over from something else: then unset them"
        ) from error
    finally:
        waiting.cancel()


def _takes_a_gpu() -> bool:
    """Return whether this process computes on a GPU; where DS_ACCELERATOR=cpu refuses them, hide them from now on."""
    if refuses_gpus(os.environ):
        # The deepspeed launcher has named devices all the same, and libraries would take them.
        os.environ.update(dict.fromkeys(VISIBLE_DEVICES, ""))
        return False
    return torch.cuda.is_available()


def _alone() -> dict[str, str]:
    """Return the variables of a launcher of one process, whatever another has left in the environment."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def set_timeouts(timeout_seconds: float) -> None:
    """Set the timeout of every existing group: `new_group` ignores the one given to `init_distributed`."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place, and return it."""
    dist.all_reduce(tensor)
    return tensor


def max_over_processes(tensor: Tensor) -> Tensor:
    """Take the maximum of a tensor over all processes, in place, and return it."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def max_over_control(values: Sequence[int], world: World) -> list[int]:
    """Return the maximum of each number over all processes, without waiting for devices."""
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=world.control)
    result: list[int] = tensor.tolist()
    return result


def broadcast_stop() -> None:
    """Ask every process to stop; each finds the request with `stop_requested`, in step with the others or not."""
    dist.distributed_c10d._get_default_store().set(STOP_KEY, "1")


def stop_requested() -> bool:
    """Return whether a process has called `broadcast_stop`."""
    found: bool = dist.distributed_c10d._get_default_store().check([STOP_KEY])
    return found


def this_rank() -> int:
    """Return this process's rank among all processes."""
    return dist.get_rank()


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Return rank 0's value on all ranks, sent over `group`, by default that of all. Others' values are ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_lists(values: list[Any], group: Any = None) -> list[Any]:
    """Return the lists of all processes, joined in the order of ranks. Sent over `group`, by default that of all."""
    parts: list[list[Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values, group=group)
    return [value for part in parts if part is not None for value in part]


def broadcast_values(parameters: Sequence[nn.Parameter], source: int, group: Any = None) -> None:
    """Copy the values of rank `source` to all processes of a group, whatever their dtype and order in memory."""
    for parameter in parameters:
        # NCCL takes contiguous tensors only, and not every dtype.
        data = parameter.data
        values = data.contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), src=source, group=group)
        if values is not data:
            data.copy_(values)


def replicate(parameters: list[nn.Parameter]) -> None:
    """Place parameters below ZeRO-3: copy rank 0's values to every process."""
    broadcast_values(parameters, source=0)


def wait_for_all() -> None:
    """Return once every process has called it."""
    dist.barrier()


def stop_processes() -> None:
    """Leave all process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
