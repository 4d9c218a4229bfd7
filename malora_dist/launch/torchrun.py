"""torchrun, called on each machine of a run: what it tells its processes, and the command that starts it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from malora_dist.errors import ConfigError
from malora_dist.launch.command import launcher_path
from malora_dist.launch.launcher import Launcher, Placement
from malora_dist.launch.scheduler import Scheduler

DEFAULT_PORT = 29500


class TorchrunLauncher(Launcher):
    """Starts processes on this machine; called on each machine of a run."""

    def command(
        self, module: str, arguments: Sequence[str], placement: Placement, environment: Mapping[str, str]
    ) -> list[str]:
        return torchrun_command(
            module,
            arguments,
            processes=placement.processes,
            nodes=placement.nodes,
            node_rank=placement.node_rank,
            master_addr=placement.master_addr,
            master_port=placement.master_port,
            launcher=launcher_path("torchrun"),
        )


class Torchrun(Scheduler):
    """Sets torch's variables, and counts the processes of this machine. It keeps no jobs."""

    name: ClassVar[str] = "torchrun"
    launcher = TorchrunLauncher()

    def num_nodes(self, environment: Mapping[str, str]) -> int | None:
        """Return the number of machines, which have the same number of processes each."""
        here, all_of_them = self.local_size(environment), environment.get("WORLD_SIZE", "")
        return int(all_of_them) // here if here and all_of_them.isdecimal() else None

    def local_size(self, environment: Mapping[str, str]) -> int | None:
        """Return what --nproc_per_node was."""
        size = environment.get("LOCAL_WORLD_SIZE", "")
        return int(size) if size.isdecimal() else None


def torchrun_command(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    nodes: int = 1,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    launcher: str = "torchrun",
) -> list[str]:
    """Return the command that runs `python -m module arguments` in `processes` processes on one of `nodes` machines.

    Args:
        module, arguments: Of each process.
        processes: The number of processes of this machine.
        nodes: The number of machines, on each of which the command is called.
        node_rank: This machine's number, from 0; needed for several machines.
        master_addr: The machine with node_rank 0; needed for several machines.
        master_port: Where the processes meet. Default: a free port on one machine, torch's own on several.
        launcher: The path of torchrun.

    Raises:
        ConfigError: If one of several machines could not find the others.
    """
    place = ["--standalone"] if master_port is None else ["--master_port", str(master_port)]
    if nodes > 1:
        if node_rank is None or node_rank >= nodes:
            raise ConfigError(f"--node_rank={node_rank}: give this machine's number, from 0 to --nnodes {nodes} less 1")
        if master_addr is None:
            raise ConfigError(f"--nnodes={nodes}: give --master_addr, the name of the machine with --node_rank 0")
        place = ["--nnodes", str(nodes), "--node_rank", str(node_rank)]
        place += ["--master_addr", master_addr, "--master_port", str(master_port or DEFAULT_PORT)]
    return [launcher, *place, "--nproc_per_node", str(processes), "-m", module, *arguments]
