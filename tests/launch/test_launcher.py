"""The schedulers that start processes at once, behind one interface."""

from pathlib import Path

import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.launcher import Placement
from malora_dist.launch.schedulers import SCHEDULERS, launcher_of

PROGRAM = ("malora_dist.train", ["r.yaml", "--adapter.r", "6"])
LAUNCHERS = [name for name, scheduler in SCHEDULERS.items() if scheduler.launcher is not None]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_processes_of_this_machine(name: str) -> None:
    launcher, placement = launcher_of(name), Placement(processes=3)
    command = launcher.command(*PROGRAM, placement, {})
    assert command[-4:] == ["malora_dist.train", "r.yaml", "--adapter.r", "6"] and "3" in command
    launcher.check(placement)
    assert not launcher.notes(placement, {"HF_HOME": "x"}) and placement.world_size == 3
    with launcher.environment(placement, {"HF_HOME": "x"}) as environment:
        assert environment["HF_HOME"] == "x" and environment["PYTHONUNBUFFERED"] == "1"


def test_hosts_get_variables_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    hosts = {"10.0.0.1": (0, 1), "10.0.0.2": (0, 1)}
    placement = Placement(processes=2, nodes=2, hosts=hosts, hostfile=Path("hosts"), master_port=7)
    launcher = launcher_of("deepspeed")
    command = launcher.command(*PROGRAM, placement, {})
    assert command[command.index("--hostfile") + 1] == "hosts" and "pdsh" in command
    (note,) = launcher.notes(placement, {"HF_HOME": "x", "HF_TOKEN": "secret", "EDITOR": "vi"})
    assert "HF_HOME" in note and "HF_TOKEN" not in note and "EDITOR" not in note
    with launcher.environment(placement, {"HF_HOME": "x"}) as environment:
        file = Path(environment["DS_ENV_FILE"])
        assert "HF_HOME=x" in file.read_text().splitlines()
    assert not file.exists()


def test_a_queue_starts_nothing_at_once() -> None:
    with pytest.raises(ConfigError, match="slurm starts no processes: those that do are deepspeed, torchrun"):
        launcher_of("slurm")
