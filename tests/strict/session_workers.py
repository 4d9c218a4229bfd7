"""Forked sessions of real commands, on the CPU or with a GPU's rules; `tests.preemption_workers` serves them.

Plants: `module`, whose `main` gets `words`, and `device`, cpu or strict.
"""

import os
import sys
from importlib import import_module
from typing import Any

from tests.preemption_workers import serve


def run(_name: str, plants: dict[str, Any], _arguments: list[str]) -> int:
    """The exit code of one rank of a session."""
    if plants["device"] == "cpu":
        return _main(plants["module"], plants["words"])
    from tests.strict.world import become_a_gpu, start_processes

    with become_a_gpu():
        # It has imported the CPU's by name.
        module: Any = import_module("malora_dist.train")
        module.start_processes = start_processes
        return _main(plants["module"], plants["words"])


def _main(module: str, arguments: list[str]) -> int:
    code: int = import_module(module).main(arguments)
    return code


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    serve(run)
