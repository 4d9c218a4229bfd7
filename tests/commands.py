"""The command line as a user calls it, in this process or where torch is not installed."""

import os
import subprocess
import sys

import pytest

from malora_dist.cli.app import main

BLOCK_TORCH = "import sys; sys.modules['torch'] = None; from malora_dist.cli.app import main; main(sys.argv[1:])"


def malora(*arguments: str) -> int:
    """Run `malora ARGUMENTS` in this process; return the code it ends with."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def malora_without_torch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `malora ARGUMENTS` in this folder, in a process that cannot import torch."""
    command = [sys.executable, "-c", BLOCK_TORCH, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
