import socket

import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.ports import free_port, meeting_port


def test_runs_on_one_machine_meet_at_ports_of_their_own() -> None:
    assert len({free_port() for _ in range(20)}) > 15
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--master_port {taken}: Address already in use; leave it out"):
            meeting_port(taken)
    port = free_port()
    assert meeting_port(port) == port and 20000 <= meeting_port(None) < 32000
