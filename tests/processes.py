"""Starts the processes of tests as forks of one server that has imported everything: a start takes a moment.

Each is a process of its own, with an environment, folder and log of its own: whatever a test does to it ends with it.
It ends with the one that started it.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.patience import Patience
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
# What a process finds in its environment; the server has read them when it imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(
    function: str,
    arguments: Sequence[Any],
    log: Path,
    *,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a process that calls "module:function" and ends with the exit code that this returns, 0 for None.

    log: gets what the process writes, appended. folder: its current one. environment: added to this process's, without
    what a launcher has set.
    """
    known = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    process = context.Process(
        target=_work, args=(function, arguments, str(log), str(folder), known | ENVIRONMENT | dict(environment or {}))
    )
    with _variables(ENVIRONMENT):
        process.start()
    return process


def start_ranks(
    function: str,
    arguments: Sequence[Any],
    logs: Sequence[Path],
    *,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Start one process for each log, with what a launcher tells the ranks of one node."""
    port, ranks = str(free_port()), []
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(logs))}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
        ranks.append(start(function, arguments, log, folder=folder, environment=place))
    return ranks


def wait(processes: Sequence[BaseProcess]) -> list[int | str]:
    """Return the exit codes, or `made no progress` of those that are ended because none of them did anything."""
    patience = Patience([process.pid for process in processes if process.pid])
    while alive := [process for process in processes if process.is_alive()]:
        if patience.is_over():
            for process in alive:
                process.kill()
            return [_end(process, process in alive) for process in processes]
        alive[0].join(0.05)
    return [_end(process, False) for process in processes]


def _end(process: BaseProcess, stuck: bool) -> int | str:
    process.join()
    assert process.exitcode is not None
    return "made no progress" if stuck else process.exitcode


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while: the server is started with those of the first process."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(function: str, arguments: Sequence[Any], log: str, folder: str, environment: dict[str, str]) -> None:
    """Become the process that was asked for."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    module, _, name = function.partition(":")
    sys.exit(getattr(import_module(module), name)(*arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
