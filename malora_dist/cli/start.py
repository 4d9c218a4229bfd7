"""From a command to the processes that carry it out: this one, or several through the deepspeed launcher."""

import os
import shlex
from collections.abc import Callable, Sequence

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.config import RunConfig
from malora_dist.config.compatibility import check_plan
from malora_dist.config.summary import adapter_spec
from malora_dist.launch.command import run_command, visible_gpus
from malora_dist.launch.launcher import Placement
from malora_dist.launch.ranks import check_processes, under_launcher
from malora_dist.launch.schedulers import launcher_of

# The program whose commands several processes run together, each told by its launcher what it is.
MALORA = "malora_dist.cli"


def start(
    work: Callable[[], int | None],
    module: str,
    arguments: Sequence[str],
    num_gpus: int | None,
    config: RunConfig | None,
    master_port: int | None = None,
) -> None:
    """Do the work in this process, or once for each device through the deepspeed launcher, and exit with its code.

    Args:
        work: What this process does alone, or as one that a launcher has started; returns its exit code.
        module: The module that does the same work when it is started with the arguments, such as `MALORA`.
        arguments: Of the module.
        num_gpus: The number of processes; None for all visible devices.
        config: The recipe, if the number of processes must fit its batch and its plan.
        master_port: Where the processes meet; None for a free port.

    Raises:
        ConfigError, TopologyError: Before any process starts, if the recipe cannot run on so many processes, or if a
            launcher has started others.
    """
    if under_launcher(os.environ):
        check_processes(os.environ, num_gpus, master_port)
        raise typer.Exit(work() or 0)
    processes = num_gpus if num_gpus is not None else visible_gpus()
    if config is not None:
        adapter_spec(config)
        check_plan(config, processes)
    if processes == 1:
        raise typer.Exit(work() or 0)
    launcher, placement = launcher_of("deepspeed"), Placement(processes=processes, master_port=master_port)
    command = launcher.command(module, arguments, placement, os.environ)
    Console(stderr=True).print(Text(f"$ {shlex.join(command)}"), soft_wrap=True)
    with launcher.environment(placement, os.environ) as environment:
        raise typer.Exit(run_command(command, environment))
