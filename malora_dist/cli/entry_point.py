"""Runs a command of malora in a process that a launcher has started by the name of a module."""

import os
import sys
from collections.abc import Sequence

from malora_dist.cli.app import main
from malora_dist.launch.ranks import place_of


def run_malora(command: Sequence[str], arguments: Sequence[str] | None) -> int:
    """Run a command of malora in this process, and return its exit code.

    A process that no launcher has started is alone: it starts no others.

    Args:
        command: The words after `malora`, such as `evaluate`.
        arguments: Of the command. Default: those of this process.
    """
    alone = [] if place_of(os.environ)[1] > 1 else ["--num_gpus", "1"]
    words = sys.argv[1:] if arguments is None else arguments
    try:
        main([*command, *alone, *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
