"""`malora launch deepspeed` and `torchrun`: a run on hosts that no scheduler manages, checked before it starts."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.cli.options import recipe_first
from malora_dist.config import load_config
from malora_dist.config.compatibility import check_plan
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from malora_dist.launch.command import run_command, visible_gpus
from malora_dist.launch.launcher import Placement
from malora_dist.launch.schedulers import launcher_of
from malora_dist.launch.ssh.hostfile import Slots, choose_hosts, read_hostfile, slots_per_host

TRAIN = "malora_dist.train"
LAUNCHER = "pdsh"

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE.yaml", show_default=False, help="Settings of the recipe may follow.")
]
MasterAddr = Annotated[str | None, typer.Option("--master_addr", "--master-addr", help="Address of the first host.")]
PORT = "Free port on the first host. Default: one that is free on this machine."
MasterPort = Annotated[
    int | None, typer.Option("--master_port", "--master-port", min=1, max=65535, help=PORT, show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command and exit.")]


def deepspeed_verb(
    context: typer.Context,
    recipe: Recipe,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Hostfile with lines `HOST slots=N`. Default: the GPUs of this machine.", show_default=False),
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Use only these hosts and slots of the hostfile: HOST@HOST:0,1.")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Use all hosts and slots of the hostfile except HOST@HOST:0,1.")
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(
            "--num_gpus", "--num-gpus", min=1, help="Number of GPUs of this machine. Default: all visible GPUs."
        ),
    ] = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    launcher: Annotated[
        str, typer.Option(help=f"Launcher that deepspeed uses to reach the hosts: {LAUNCHER}.")
    ] = LAUNCHER,
    no_ssh_check: Annotated[
        bool, typer.Option("--no-ssh-check", help="Skip the check that all hosts can be reached by ssh.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Train with the deepspeed launcher: on the hosts of a hostfile, reached by ssh, or on this machine."""
    if launcher != LAUNCHER:
        raise ConfigError(
            f"--launcher={launcher}: only {LAUNCHER} is supported: with others deepspeed does not set the ranks that "
            "the processes need"
        )
    path, overrides = recipe_first(recipe, context.args)
    hosts = _chosen_hosts(hostfile, include, exclude, num_gpus)
    named = {"--include": include, "--exclude": exclude}
    placement = Placement(
        processes=slots_per_host(hosts) if hosts else num_gpus or visible_gpus(),
        nodes=len(hosts) or 1,
        master_addr=master_addr,
        master_port=master_port,
        hosts=hosts,
        hostfile=hostfile,
        selection=tuple(word for option, text in named.items() if text for word in (option, text)),
        check_hosts=not no_ssh_check,
    )
    raise typer.Exit(_start("deepspeed", path, overrides, placement, dry_run))


def torchrun_verb(
    context: typer.Context,
    recipe: Recipe,
    nnodes: Annotated[int, typer.Option(min=1, help="Number of machines; call this command on each of them.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option("--node_rank", "--node-rank", min=0, help="Rank of this machine, from 0.")
    ] = None,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            "--nproc_per_node",
            "--nproc-per-node",
            min=1,
            help="Processes on this machine. Default: one for each visible GPU.",
        ),
    ] = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    dry_run: DryRun = False,
) -> None:
    """Train with torchrun: on this machine, or on several, on each of which the command is called."""
    path, overrides = recipe_first(recipe, context.args)
    placement = Placement(
        processes=nproc_per_node or visible_gpus(),
        nodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
    )
    raise typer.Exit(_start("torchrun", path, overrides, placement, dry_run))


def _chosen_hosts(hostfile: Path | None, include: str | None, exclude: str | None, num_gpus: int | None) -> Slots:
    """Return the hosts of a hostfile to train on, none without one.

    Raises ConfigError for options that contradict each other, and as choose_hosts.
    """
    if hostfile is not None:
        if num_gpus is not None:
            raise ConfigError(f"--num_gpus={num_gpus}: with --hostfile, its slots and --include say which GPUs")
        return choose_hosts(read_hostfile(hostfile), include, exclude)
    if include or exclude:
        raise ConfigError("--include and --exclude choose from a --hostfile; for this machine give --num_gpus")
    return {}


def _start(scheduler: str, path: str, overrides: list[str], placement: Placement, dry_run: bool) -> int:
    """Check everything, print the command and run it; return its exit code.

    Raises ConfigError or TopologyError, before anything starts, for a recipe that cannot run on so many processes, and
    where they cannot be started.
    """
    config = load_config(path, overrides)
    adapter_spec(config)
    check_plan(config, placement.world_size)
    launcher = launcher_of(scheduler)
    command = launcher.command(TRAIN, [path, *overrides], placement, os.environ)
    if not dry_run:
        launcher.check(placement)
    with launcher.environment(placement, os.environ) as environment:
        for note in launcher.notes(placement, os.environ):
            Console(stderr=True).print(Text(note), soft_wrap=True)
        Console(stderr=not dry_run).print(Text(f"$ {shlex.join(command)}"), soft_wrap=True)
        return 0 if dry_run else run_command(command, environment, local=not placement.hosts)
