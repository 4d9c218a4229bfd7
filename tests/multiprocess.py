"""Runs a function on several real processes over gloo and hands back what they return.

The function is named as "module:function", takes the World and keyword arguments, and returns plain JSON values. Every
collective refuses tensors that are not contiguous, as NCCL does and gloo does not.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.processes import ROOT, start_ranks, wait

__all__ = ["ROOT", "run_distributed"]
COLLECTIVE_TIMEOUT = 60
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


def run_distributed(function: str, world_size: int, *, device: str = "cpu", **arguments: Any) -> list[Any]:
    """Results of all ranks, in their order. Raises AssertionError with every rank's output if one fails.

    device: cpu, or strict, where each process believes to have a GPU (`tests.strict.world`).
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(world_size)]
        codes = wait(start_ranks("tests.multiprocess:work", [device, function, folder, arguments], logs))
        said = "\n".join(f"--- rank {rank}\n{log.read_text()}" for rank, log in enumerate(logs))
        assert codes == [0] * world_size, f"exit codes {codes}\n{said}"
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def work(device: str, name: str, folder: str, arguments: dict[str, Any]) -> None:
    """Be one rank: call the function and leave what it returns in the folder."""
    refuse_non_contiguous()
    with _become(device):
        from malora_dist.distributed.process_groups import start_processes, wait_for_all

        module, _, function = name.partition(":")
        world = start_processes(COLLECTIVE_TIMEOUT)
        result = getattr(import_module(module), function)(world, **arguments)
        Path(folder, f"{world.rank}.json").write_text(json.dumps(result))
        wait_for_all()


def _become(device: str) -> AbstractContextManager[object]:
    if device == "cpu":
        return nullcontext()
    from tests.strict.world import become_a_gpu

    return become_a_gpu()


def refuse_non_contiguous() -> None:
    """Let every collective of this process raise ValueError for a tensor that is not contiguous, for good."""
    import torch.distributed as dist

    c10d: Any = dist.distributed_c10d
    for name in COLLECTIVES:
        checked = contiguous_only(name, getattr(c10d, name))
        setattr(c10d, name, checked)
        setattr(dist, name, checked)


def contiguous_only(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, which raises ValueError for a tensor that is not contiguous."""
    from torch.utils._pytree import tree_leaves

    @wraps(collective)
    def checked(*arguments: Any, **settings: Any) -> Any:
        for leaf in tree_leaves((arguments, settings)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_contiguous():
                raise ValueError(f"{name}: Tensors must be contiguous, but one has strides {leaf.stride()}")
        return collective(*arguments, **settings)

    return checked


def group_timeouts() -> list[float]:
    """Return the timeout in seconds of every backend of every group of this process."""
    from torch.distributed.distributed_c10d import _world

    backends = [group._get_backend(device) for group in _world.pg_map for device in group._device_types]
    return [backend.options._timeout.total_seconds() for backend in backends]
