"""What a process of the tests sees of GPUs; it joins the run's processes, as training does."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from malora_dist.distributed.process_groups import World, start_processes, stop_processes
from tests.devices import HIDDEN


def see(world: World) -> dict[str, Any]:
    """The variables that hide GPUs, whether torch finds any, and the device to compute on."""
    variables = {name: os.environ.get(name) for name in HIDDEN}
    return {"variables": variables, "available": torch.cuda.is_available(), "device": world.device.type}


def see_at_start(_world: World) -> dict[str, str]:
    """Return the variables that hide GPUs, as the program of this process found them when it started."""
    found = dict(line.partition("=")[::2] for line in Path("/proc/self/environ").read_text().split("\0"))
    return {name: found[name] for name in HIDDEN if name in found}


def main() -> None:
    print("sees", json.dumps(see(start_processes(60))), flush=True)
    stop_processes()


if __name__ == "__main__":
    sys.exit(main())
