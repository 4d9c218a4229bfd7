"""`malora launch deepspeed` and `torchrun`: a run on hosts that no scheduler manages, checked before it starts."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
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
from malora_dist.launch.command import (
    VISIBLE_DEVICES,
    deepspeed_command,
    launcher_environment,
    launcher_path,
    run_command,
    visible_gpus,
)
from malora_dist.launch.ports import meeting_port
from malora_dist.launch.ssh.check import check_hosts, is_this_machine
from malora_dist.launch.ssh.hostfile import Slots, choose_hosts, read_hostfile, slots_per_host
from malora_dist.launch.ssh.pdsh import env_file_text, handed_on, hosts_command, runner_environment
from malora_dist.launch.torchrun import torchrun_command

TRAIN = "malora_dist.train"
LAUNCHER = "pdsh"

Recipe = Annotated[str, typer.Argument(metavar="RECIPE.yaml", show_default=False, help="Its settings follow it.")]
MasterAddr = Annotated[str | None, typer.Option("--master_addr", "--master-addr", help="The first host's address.")]
PORT = "A free port of the first host. Default: one that is free here."
MasterPort = Annotated[
    int | None, typer.Option("--master_port", "--master-port", min=1, max=65535, help=PORT, show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command, and stop.")]


def deepspeed_verb(
    context: typer.Context,
    recipe: Recipe,
    hostfile: Annotated[
        Path | None, typer.Option(help="Lines `HOST slots=N`. Default: this machine's GPUs.", show_default=False)
    ] = None,
    include: Annotated[str | None, typer.Option(help="Of the hostfile only HOST@HOST:0,1.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Of the hostfile all but HOST@HOST:0,1.")] = None,
    num_gpus: Annotated[
        int | None, typer.Option("--num_gpus", "--num-gpus", min=1, help="GPUs of this machine. Default: all visible.")
    ] = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    launcher: Annotated[str, typer.Option(help=f"How deepspeed reaches the hosts: {LAUNCHER}.")] = LAUNCHER,
    no_ssh_check: Annotated[bool, typer.Option("--no-ssh-check", help="Do not try to reach the hosts first.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train with the deepspeed launcher: on the hosts of a hostfile, reached by ssh, or on this machine."""
    if launcher != LAUNCHER:
        raise ConfigError(f"--launcher={launcher}: deepspeed tells the processes who they are with {LAUNCHER} alone")
    path, overrides = recipe_first(recipe, context.args)
    chosen = _chosen_hosts(hostfile, include, exclude, num_gpus)
    _check(path, overrides, len(chosen) * slots_per_host(chosen))
    arguments = [path, *overrides]
    here = hostfile is None or _only_this_machine(chosen)
    port = meeting_port(master_port) if here or master_port is None else master_port
    place = [*(["--master_addr", master_addr] if master_addr else []), "--master_port", str(port)]
    if here or hostfile is None:
        (slots,) = chosen.values()
        visible = os.environ if hostfile is None else _visible(slots)
        raise typer.Exit(_run(_local_command(arguments, len(slots), visible, place), os.environ, dry_run))
    named = {"--include": include, "--exclude": exclude}
    selection = [word for option, text in named.items() if text for word in (option, text)]
    command = hosts_command(
        TRAIN, arguments, hostfile=hostfile, selection=selection, place=place, launcher=launcher_path()
    )
    raise typer.Exit(_run_on_hosts(command, chosen, try_ssh=not no_ssh_check, dry_run=dry_run))


def torchrun_verb(
    context: typer.Context,
    recipe: Recipe,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; this is called on each of them.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option("--node_rank", "--node-rank", min=0, help="This machine's number, from 0.")
    ] = None,
    nproc_per_node: Annotated[
        int | None,
        typer.Option("--nproc_per_node", "--nproc-per-node", min=1, help="Processes here. Default: all visible GPUs."),
    ] = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    dry_run: DryRun = False,
) -> None:
    """Train with torchrun: on this machine, or as one of several on which the same is called."""
    path, overrides = recipe_first(recipe, context.args)
    processes = nproc_per_node if nproc_per_node is not None else visible_gpus()
    _check(path, overrides, nnodes * processes)
    command = torchrun_command(
        TRAIN,
        [path, *overrides],
        processes=processes,
        nodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        launcher=launcher_path("torchrun"),
    )
    raise typer.Exit(_run(command, os.environ, dry_run))


def _check(path: str, overrides: list[str], processes: int) -> None:
    """Raises ConfigError or TopologyError for a recipe that cannot run on so many processes."""
    config = load_config(path, overrides)
    adapter_spec(config)
    check_plan(config, processes)


def _chosen_hosts(hostfile: Path | None, include: str | None, exclude: str | None, num_gpus: int | None) -> Slots:
    """The hosts to train on. Raises ConfigError for options at odds, and as choose_hosts."""
    if hostfile is not None:
        if num_gpus is not None:
            raise ConfigError(f"--num_gpus={num_gpus}: with --hostfile, its slots and --include say which GPUs")
        return choose_hosts(read_hostfile(hostfile), include, exclude)
    if include or exclude:
        raise ConfigError("--include and --exclude choose from a --hostfile; for this machine give --num_gpus")
    return {"localhost": tuple(range(num_gpus if num_gpus is not None else visible_gpus()))}


def _only_this_machine(chosen: Slots) -> bool:
    """Neither ssh nor pdsh is needed then."""
    return len(chosen) == 1 and all(is_this_machine(host) for host in chosen)


def _local_command(arguments: list[str], gpus: int, environment: Mapping[str, str], place: list[str]) -> list[str]:
    return deepspeed_command(
        TRAIN, arguments, num_gpus=gpus, environment=environment, launcher=launcher_path(), options=place
    )


def _visible(slots: Sequence[int]) -> dict[str, str]:
    """As if only those GPUs were visible; nothing for the first of them, which --num_gpus says."""
    return {} if list(slots) == list(range(len(slots))) else {VISIBLE_DEVICES[0]: ",".join(map(str, slots))}


def _run_on_hosts(command: Sequence[str], chosen: Slots, *, try_ssh: bool, dry_run: bool) -> int:
    """Run it with the variables that the processes need, once all hosts are there; its exit code.

    Raises ConfigError, before anything starts, if pdsh or a host is missing.
    """
    variables = handed_on(launcher_environment(os.environ))
    text = env_file_text(variables, os.environ)
    if not dry_run:
        if shutil.which("pdsh") is None:
            raise ConfigError("pdsh is not installed here: deepspeed starts the processes of other hosts with it")
        if try_ssh:
            check_hosts(list(chosen), Path.cwd())
    with tempfile.TemporaryDirectory(prefix="malora-") as folder:
        file = Path(folder) / "environment"
        file.write_text(text, encoding="utf-8")
        Console(stderr=True).print(Text(f"handed on to the hosts: {', '.join(variables)}"), soft_wrap=True)
        return _run(command, runner_environment(os.environ, file), dry_run)


def _run(command: Sequence[str], environment: Mapping[str, str], dry_run: bool) -> int:
    """Print the command and run it; its exit code."""
    Console(stderr=not dry_run).print(Text(f"$ {shlex.join(command)}"), soft_wrap=True)
    return 0 if dry_run else run_command(command, launcher_environment(environment), local=False)
