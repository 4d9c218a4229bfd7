"""Runs a function on several real processes over gloo, each its own interpreter, and hands back what they return.

The function is named as "module:function", takes the World and keyword arguments, and returns plain JSON values. Every
collective refuses tensors that are not contiguous, as NCCL does and gloo does not.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
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


def run_distributed(
    function: str, world_size: int, *, timeout: float = 280, device: str = "cpu", **arguments: Any
) -> list[Any]:
    """Results of all ranks, in their order. Raises AssertionError with every rank's output if one fails.

    device: cpu, or strict, where each process believes to have a GPU (`tests.strict.world`).
    """
    with tempfile.TemporaryDirectory() as folder:
        port = str(_free_port())
        processes = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "tests.distributed", device, function, folder, json.dumps(arguments)]
            with Path(folder, f"{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        codes = [_wait(process, timeout) for process in processes]
        logs = "\n".join(f"--- rank {rank}\n{Path(folder, f'{rank}.log').read_text()}" for rank in range(world_size))
        assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | str:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "timed out"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _work(device: str, name: str, folder: str, arguments: str) -> None:
    refuse_non_contiguous()
    with _become(device):
        from malora_dist.parallel.groups import start_processes, wait_for_all

        module, _, function = name.partition(":")
        world = start_processes(COLLECTIVE_TIMEOUT)
        result = getattr(import_module(module), function)(world, **json.loads(arguments))
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


if __name__ == "__main__":
    try:
        _work(*sys.argv[1:])
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown can abort gloo's threads after everything is done.
    os._exit(code)
