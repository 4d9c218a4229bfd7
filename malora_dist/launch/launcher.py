"""Launchers: schedulers that start the processes of a run at once, on this machine or on hosts, without a queue."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from malora_dist.launch.command import launcher_environment


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the processes of a run start.

    processes: of each node. nodes, node_rank: the number of nodes, and this one's number where the launcher is called
    on each of them. master_addr, master_port: where the processes meet; None leaves it to the launcher. hosts: the
    slots of each host that the launcher reaches itself; empty for this machine. hostfile, selection: the file that
    names them, and options that choose from it. check_hosts: whether all hosts are tried before anything starts.
    """

    processes: int
    nodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    hosts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hostfile: Path | None = None
    selection: tuple[str, ...] = ()
    check_hosts: bool = True

    @property
    def world_size(self) -> int:
        """The number of all processes."""
        return self.nodes * self.processes


class Launcher(ABC):
    """Starts the processes of a run with one command, which ends when they have ended."""

    @abstractmethod
    def command(
        self, module: str, arguments: Sequence[str], placement: Placement, environment: Mapping[str, str]
    ) -> list[str]:
        """Return the command that runs `python -m module arguments` in each process.

        Raises ConfigError if it cannot start them there.
        """

    @contextmanager
    def environment(self, placement: Placement, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Give the environment of the command, and hold what it needs while it runs."""
        yield launcher_environment(environment)

    def notes(self, placement: Placement, environment: Mapping[str, str]) -> list[str]:
        """Return notes on the start for the user. Raises ConfigError for an environment that has no form."""
        return []

    def check(self, placement: Placement) -> None:
        """Raise ConfigError if a host, or a program of this machine that is needed, is not there."""
        return None
