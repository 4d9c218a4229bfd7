"""The network interface for the processes of several nodes: the one with the route to MASTER_ADDR."""

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

from malora_dist.errors import TopologyError
from malora_dist.launch.schedulers import num_nodes

GLOO = "GLOO_SOCKET_IFNAME"
ANY_PORT = 9
# Family and socket address, as socket.getaddrinfo returns them.
Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def interface_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return GLOO_SOCKET_IFNAME for a process of a run over several nodes.

    Without it gloo takes the interface of the host's own name, which may be the loopback; NCCL chooses well by itself.
    Empty on one node, if it is set, and if the interface is not found out. Raises TopologyError if MASTER_ADDR leads to
    this node itself wherever it is looked up.
    """
    master = environment.get("MASTER_ADDR")
    if not master or environment.get(GLOO) or not _several_nodes(environment):
        return {}
    addresses = _addresses(master)
    ways = [(family, address) for family, address in addresses if not _is_loopback(address[0])]
    if addresses and not ways:
        own = addresses[0][1][0]
        if "TORCHELASTIC_RUN_ID" in environment and master in ("localhost", own):
            # torchrun's launchers have connected there already: several of them run on one machine.
            return {}
        raise TopologyError(_loopback_message(master, own))
    name = next((name for address in ways if (name := _interface(*address)) is not None), None)
    return {} if name is None else {GLOO: name}


def _several_nodes(environment: Mapping[str, str]) -> bool:
    return environment.get("WORLD_SIZE") != "1" and num_nodes(environment) > 1


def _addresses(host: str) -> list[Address]:
    try:
        return [(found[0], found[4]) for found in socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)]
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _interface(family: socket.AddressFamily, address: tuple[Any, ...]) -> str | None:
    """Return the interface with the address from which this host would send to `address`."""
    import psutil

    try:
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            # connect() of a datagram socket sends nothing, and only looks up the route.
            way.connect(address)
            own = way.getsockname()[0]
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(
            entry.family == family and entry.address.partition("%")[0] == own.partition("%")[0] for entry in entries
        ):
            return str(name)
    return None


def _loopback_message(master: str, address: str) -> str:
    how = "" if master == address else f" is {address} on {socket.gethostname()}, which"
    hosts = "" if master == address else "; /etc/hosts may say so of the host's own name, as on Debian"
    return (
        f"MASTER_ADDR={master}{how} only this node itself can reach, and the run has several nodes{hosts}. Set "
        f"MASTER_ADDR to the first node's address in the network, or {GLOO} (and NCCL_SOCKET_IFNAME) to an interface"
    )
