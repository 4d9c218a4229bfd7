"""The deepspeed launcher, on one machine or, by pdsh over ssh, on several: what it tells its processes."""

from collections.abc import Mapping
from typing import ClassVar

from malora_dist.launch.scheduler import Scheduler
from malora_dist.launch.ssh.launcher import DeepSpeedLauncher


class DeepSpeed(Scheduler):
    """Sets torch's variables, and counts nodes and processes in its own. It keeps no jobs."""

    name: ClassVar[str] = "deepspeed"
    launcher = DeepSpeedLauncher()

    def num_nodes(self, environment: Mapping[str, str]) -> int | None:
        """Return the number of hosts."""
        return _number(environment, "CROSS_SIZE")

    def local_size(self, environment: Mapping[str, str]) -> int | None:
        """Return the number of slots of this host."""
        return _number(environment, "LOCAL_SIZE")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    return int(environment[name]) if environment.get(name, "").isdecimal() else None
