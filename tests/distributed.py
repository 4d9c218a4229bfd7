"""Runs a function on several real processes over gloo, each its own interpreter, and hands back what they return.

The function is named as "module:function", takes the World and keyword arguments, and returns plain JSON values.
Tensors that are sent must be contiguous, as NCCL demands of them; gloo would take any.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
COLLECTIVE_TIMEOUT = 60


def run_distributed(function: str, world_size: int, *, timeout: float = 280, **arguments: Any) -> list[Any]:
    """Results of all ranks, in their order. Raises AssertionError with every rank's output if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        port = str(_free_port())
        processes = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "tests.distributed", function, folder, json.dumps(arguments)]
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


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "broadcast", "gather",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
)  # fmt: skip


def _like_nccl(collective: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(collective)
    def checked(*arguments: Any, **settings: Any) -> Any:
        for leaf in tree_leaves((arguments, settings)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_contiguous():
                raise ValueError(f"{collective.__name__}: tensors must be contiguous, not {tuple(leaf.stride())}")
        return collective(*arguments, **settings)

    return checked


def _work(name: str, folder: str, arguments: str) -> None:
    from malora_dist.parallel.groups import start_processes, wait_for_all

    module, _, function = name.partition(":")
    for collective in COLLECTIVES:
        setattr(dist, collective, _like_nccl(getattr(dist, collective)))
    world = start_processes(COLLECTIVE_TIMEOUT)
    result = getattr(import_module(module), function)(world, **json.loads(arguments))
    Path(folder, f"{world.rank}.json").write_text(json.dumps(result))
    wait_for_all()


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
