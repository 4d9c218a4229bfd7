"""Ports of this machine at which the processes of a run meet."""

import socket
from random import Random

from malora_dist.errors import ConfigError

FIRST_PORT, PORTS = 20000, 12000


def meeting_port(wanted: int | None) -> int:
    """Return the port of this machine at which a run's processes meet, by default a free one.

    Raises ConfigError if the wanted one cannot be had.
    """
    if wanted is None:
        return free_port()
    refusal = _refusal(wanted)
    if refusal is not None:
        raise ConfigError(f"--master_port {wanted}: {refusal}; leave it out, and a free port is taken")
    return wanted


def free_port() -> int:
    """Return a port of this machine that is free now, and that the system gives to no outgoing connection."""
    ports = Random().sample(range(FIRST_PORT, FIRST_PORT + PORTS), PORTS)
    return next(port for port in ports if _refusal(port) is None)


def _refusal(port: int) -> str | None:
    """Return why no process of this machine could listen at the port; None if one could."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            return error.strerror
    return None
