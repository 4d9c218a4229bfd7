"""The deepspeed launcher behind the interface of all launchers: on this machine, or by pdsh over ssh on hosts."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from malora_dist.errors import ConfigError
from malora_dist.launch.command import (
    VISIBLE_DEVICES,
    count_gpus,
    deepspeed_command,
    launcher_environment,
    launcher_path,
)
from malora_dist.launch.launcher import Launcher, Placement
from malora_dist.launch.ports import meeting_port
from malora_dist.launch.ssh.check import check_hosts, is_this_machine
from malora_dist.launch.ssh.pdsh import env_file_text, handed_on, hosts_command, runner_environment


class DeepSpeedLauncher(Launcher):
    """Starts a process for each slot of the hosts, or for each device of this machine."""

    def command(
        self, module: str, arguments: Sequence[str], placement: Placement, environment: Mapping[str, str]
    ) -> list[str]:
        port = placement.master_port
        if port is None or not _is_remote(placement):
            port = meeting_port(port)
        address = ["--master_addr", placement.master_addr] if placement.master_addr else []
        place = [*address, "--master_port", str(port)]
        if placement.hostfile is not None and _is_remote(placement):
            return hosts_command(
                module,
                arguments,
                hostfile=placement.hostfile,
                selection=placement.selection,
                place=place,
                launcher=launcher_path(),
            )
        return deepspeed_command(
            module,
            arguments,
            num_gpus=placement.processes,
            environment=_visible(placement, environment),
            launcher=launcher_path(),
            options=place,
        )

    def notes(self, placement: Placement, environment: Mapping[str, str]) -> list[str]:
        if not _is_remote(placement):
            return []
        return [f"variables passed to the hosts: {', '.join(handed_on(launcher_environment(environment)))}"]

    def check(self, placement: Placement) -> None:
        if not _is_remote(placement):
            return
        if shutil.which("pdsh") is None:
            raise ConfigError("pdsh is not installed here: deepspeed starts the processes of other hosts with it")
        if placement.check_hosts:
            check_hosts(list(placement.hosts), Path.cwd())

    @contextmanager
    def environment(self, placement: Placement, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Give the launcher's environment; for hosts, with a file of the variables that their processes get."""
        own = launcher_environment(environment)
        if not _is_remote(placement):
            if not placement.hosts and not count_gpus(environment):
                # Told that there is no accelerator, DeepSpeed does not warn that it found none.
                own["DS_ACCELERATOR"] = "cpu"
            yield own
            return
        with tempfile.TemporaryDirectory(prefix="malora-") as folder:
            file = Path(folder) / "environment"
            file.write_text(env_file_text(handed_on(own), environment), encoding="utf-8")
            yield runner_environment(own, file)


def _is_remote(placement: Placement) -> bool:
    """Return whether other hosts take part; for this machine alone neither ssh nor pdsh is needed."""
    hosts = list(placement.hosts)
    return bool(hosts) and not (len(hosts) == 1 and is_this_machine(hosts[0]))


def _visible(placement: Placement, environment: Mapping[str, str]) -> Mapping[str, str]:
    """Return which devices are visible: those of a hostfile's slots, or of the environment.

    The first slots are those that --num_gpus alone means.
    """
    if not placement.hosts:
        return environment
    (slots,) = placement.hosts.values()
    return {} if slots == tuple(range(len(slots))) else {VISIBLE_DEVICES[0]: ",".join(map(str, slots))}
