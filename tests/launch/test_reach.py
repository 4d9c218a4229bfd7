from pathlib import Path

import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.reach import check_reachable, is_this_machine


def test_this_machine() -> None:
    assert is_this_machine("localhost") and is_this_machine("me@127.0.0.1")
    # An address for documents, and a name that nobody has.
    assert not is_this_machine("192.0.2.1") and not is_this_machine("no-such-host.invalid")


def test_ssh_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of hosts is in tests/slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot start ssh: No such file"):
        check_reachable(["192.0.2.1"], tmp_path)
