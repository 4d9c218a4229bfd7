"""Runs an example as `python examples/NAME.py ARGUMENTS` does, in a process that has imported everything."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> None:
    """Be the script that the first argument names."""
    script = arguments[0]
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
