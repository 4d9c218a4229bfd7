from pathlib import Path

import pytest
from deepspeed.launcher import runner

from malora_dist.errors import ConfigError
from malora_dist.launch.ssh.check import check_hosts, is_this_machine
from malora_dist.launch.ssh.hostfile import addresses, choose_hosts, read_hostfile, slots_per_host

HOSTS = {"10.0.0.1": 2, "10.0.0.2": 2, "10.0.0.3": 3}
GOOD = "# hosts\n\n10.0.0.1 slots=2\n  10.0.0.2\tslots=2   # the second\n10.0.0.3   slots=3\r\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert read_hostfile(path) == HOSTS == dict(runner.fetch_hostfile(str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.invalid slots=2\na.invalid slots=4\n", "hosts:2: a.invalid has line 1 already; give all its slots there"),
        ("a.invalid\n", "hosts:1: 'a.invalid': slots=N is missing"),
        ("\na.invalid slots=\n", "hosts:2: 'a.invalid slots=': a line is HOST slots=N"),
        ("a.invalid slots=two\n", "hosts:1: 'a.invalid slots=two': slots=two must be a whole number, at least 1"),
        ("a.invalid slots=8x\n", "slots=8x must be a whole number"),
        ("a.invalid slots=2.5\n", "slots=2.5 must be a whole number"),
        ("a.invalid slots=-1\n", "slots=-1 must be a whole number"),
        ("a.invalid slots=0 # off\n", "hosts:1: 'a.invalid slots=0 # off': slots=0 must be a whole number, at least 1"),
        ("a.invalid slots = 2\n", "a line is HOST slots=N"),
        ("a.invalid slots=2 max_slots=4\n", "a line is HOST slots=N"),
        ("a.invalid 2\n", "a line is HOST slots=N"),
        ("slots=2\n", "a line is HOST slots=N"),
        ("", "names no host; a line is HOST slots=N"),
        ("# a.invalid slots=2\n\n", "names no host"),
        ("localhost slots=1\n127.0.0.1 slots=1\n", "hosts:2: 127.0.0.1 is localhost of line 1 again, at 127.0.0.1"),
        ("me@10.0.0.1 slots=1\n#\n10.0.0.1 slots=1\n", "hosts:3: 10.0.0.1 is me@10.0.0.1 of line 1 again"),
    ],
)
def test_a_line_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(write(tmp_path, text))
    assert message in str(caught.value) and str(tmp_path / "hosts") in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--hostfile=.*no-hosts cannot be read: No such file"):
        read_hostfile(tmp_path / "no-hosts")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_hostfile(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: it is no text"):
        read_hostfile(tmp_path / "binary")


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (None, None),
        ("10.0.0.2", None),
        ("10.0.0.3:2,0@10.0.0.1", None),
        ("10.0.0.3:1,1", None),
        (None, "10.0.0.1"),
        (None, "10.0.0.3:0@10.0.0.2"),
        (None, "10.0.0.1:0,1"),
    ],
)
def test_a_choice_is_deepspeeds(include: str | None, exclude: str | None) -> None:
    theirs = runner.parse_inclusion_exclusion(HOSTS, include or "", exclude or "")
    assert {host: list(slots) for host, slots in choose_hosts(HOSTS, include, exclude).items()} == dict(theirs)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("10.0.0.9", None, "--include=10.0.0.9: '10.0.0.9' is not in the hostfile, which has 10.0.0.1, 10.0.0.2"),
        (None, "10.0.0.9:0", "--exclude=10.0.0.9:0: '10.0.0.9' is not in the hostfile"),
        ("10.0.0.1:2", None, "'2' is not a slot of 10.0.0.1, which has slots 0 to 1"),
        ("10.0.0.1:-1", None, "'-1' is not a slot"),
        ("10.0.0.1:", None, "'' is not a slot"),
        ("10.0.0.1:0@", None, "'' is not in the hostfile"),
        (None, "10.0.0.3:0,3", "'3' is not a slot of 10.0.0.3, which has slots 0 to 2"),
        ("10.0.0.1:0@10.0.0.1:1", None, "10.0.0.1 is named twice; write 10.0.0.1:0,1"),
        ("10.0.0.1", "10.0.0.2", "--include=10.0.0.1 and --exclude=10.0.0.2: give one of them"),
        (None, "10.0.0.1@10.0.0.2@10.0.0.3:0,1,2", "leaves none of the hostfile's slots"),
    ],
)
def test_a_choice_that_cannot_be_made(include: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_hosts(HOSTS, include, exclude)
    assert message in str(caught.value)


def test_every_host_runs_the_same_number_of_processes() -> None:
    with pytest.raises(ConfigError) as caught:
        slots_per_host(choose_hosts(HOSTS, None, None))
    assert "10.0.0.3 has 3, not 2 as 10.0.0.1, 10.0.0.2;" in str(caught.value)
    assert slots_per_host(choose_hosts(HOSTS, None, "10.0.0.3:0")) == 2
    assert slots_per_host(choose_hosts(HOSTS, "10.0.0.1:1@10.0.0.3:2", None)) == 1


def test_addresses() -> None:
    assert addresses("me@10.0.0.1") == {"10.0.0.1"} and "127.0.0.1" in addresses("localhost")
    assert addresses("no-such-host.invalid") == set() and addresses("a" * 80) == set()


def test_this_machine() -> None:
    assert is_this_machine("localhost") and is_this_machine("me@127.0.0.1")
    # An address for documents, and a name that nobody has.
    assert not is_this_machine("192.0.2.1") and not is_this_machine("no-such-host.invalid")


@pytest.mark.e2e
def test_ssh_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of hosts is in tests/slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot start ssh: No such file"):
        check_hosts(["192.0.2.1"], tmp_path)
