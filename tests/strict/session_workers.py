"""Ranks of real commands, on the CPU or with a GPU's rules."""

from importlib import import_module
from typing import Any


def run(device: str, module: str, arguments: list[str]) -> int:
    """Return the exit code of a module's `main`. device: cpu or strict."""
    if device == "cpu":
        return _main(module, arguments)
    from tests.strict.world import become_a_gpu, start_processes

    with become_a_gpu():
        # It has imported the CPU's by name.
        train: Any = import_module("malora_dist.train")
        train.start_processes = start_processes
        return _main(module, arguments)


def _main(module: str, arguments: list[str]) -> int:
    code: int = import_module(module).main(arguments)
    return code
