"""From a command to the processes that carry it out: in this one, or through the deepspeed launcher."""

import os
import shlex
from collections.abc import Sequence
from importlib import import_module

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.config import RunConfig
from malora_dist.config.compatibility import check_plan
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from malora_dist.launch.command import (
    deepspeed_command,
    launcher_environment,
    launcher_path,
    run_command,
    visible_gpus,
)
from malora_dist.launch.ports import meeting_port
from malora_dist.launch.ranks import check_processes, under_launcher


def recipe_first(recipe: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe and its overrides. Raises ConfigError if an option stands where the recipe belongs."""
    if recipe.startswith("-"):
        raise ConfigError(f"the recipe comes before its settings: RECIPE.yaml {recipe} ...")
    return recipe, list(overrides)


def start(
    module: str,
    arguments: Sequence[str],
    num_gpus: int | None,
    config: RunConfig | None,
    master_port: int | None = None,
) -> None:
    """Run the module's main here, or once for each device through the deepspeed launcher, and exit with its code.

    `master_port` is where those processes meet, by default a free port. Raises ConfigError or TopologyError if the
    recipe cannot run on so many processes, or if a launcher has started others, before any of them starts.
    """
    if under_launcher(os.environ):
        check_processes(os.environ, num_gpus, master_port)
        raise typer.Exit(import_module(module).main(arguments) or 0)
    processes = num_gpus if num_gpus is not None else visible_gpus()
    if config is not None:
        adapter_spec(config)
        check_plan(config, processes)
    if processes == 1:
        raise typer.Exit(import_module(module).main(arguments) or 0)
    command = deepspeed_command(
        module,
        arguments,
        num_gpus=processes,
        environment=os.environ,
        launcher=launcher_path(),
        options=["--master_port", str(meeting_port(master_port))],
    )
    Console(stderr=True).print(Text(f"$ {shlex.join(command)}"), soft_wrap=True)
    raise typer.Exit(run_command(command, launcher_environment(os.environ)))
