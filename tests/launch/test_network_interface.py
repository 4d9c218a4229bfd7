"""The interface of the way to MASTER_ADDR, on the interfaces this machine has. tests/slurm runs several nodes."""

import ipaddress
import socket

import psutil
import pytest

from malora_dist.errors import TopologyError
from malora_dist.launch.network_interface import GLOO, interface_variables

TWO_NODES = {"SLURM_NNODES": "2"}


def own_addresses() -> list[tuple[str, str]]:
    """Interface and address of this machine in a network, the loopback left out."""
    found = [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return [(name, text) for name, text in found if not ipaddress.ip_address(text.partition("%")[0]).is_loopback]


def test_the_masters_own_address_gives_its_interface_and_not_the_loopback() -> None:
    for name, address in own_addresses() or pytest.skip("this machine is in no network"):
        found = interface_variables({"MASTER_ADDR": address, **TWO_NODES})
        assert found == {GLOO: name}, address


def test_a_neighbour_is_reached_over_the_interface_of_its_network() -> None:
    own = [(name, text) for name, text in own_addresses() if ":" not in text] or pytest.skip("no IPv4 network")
    name, address = own[0]
    mask = next(entry.netmask for entry in psutil.net_if_addrs()[name] if entry.address == address)
    hosts = ipaddress.ip_network(f"{address}/{mask}", strict=False).hosts()
    neighbour = next(str(host) for host in hosts if str(host) != address)
    assert interface_variables({"MASTER_ADDR": neighbour, **TWO_NODES}) == {GLOO: name}


def test_what_is_set_is_kept() -> None:
    name, address = (own_addresses() or pytest.skip("this machine is in no network"))[0]
    environment = {"MASTER_ADDR": address, **TWO_NODES}
    assert interface_variables({**environment, GLOO: "ib0"}) == {}
    assert interface_variables({"MASTER_ADDR": "127.0.0.1", **TWO_NODES, GLOO: "lo"}) == {}


@pytest.mark.parametrize(
    "several",
    [{"CROSS_SIZE": "2"}, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"SLURM_NNODES": "2"},
     {"SLURM_JOB_NUM_NODES": "2"}, {"SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "3"}],
)  # fmt: skip
def test_the_loopback_is_refused_over_several_nodes(several: dict[str, str]) -> None:
    with pytest.raises(TopologyError, match=r"MASTER_ADDR=127.0.1.1 only this node itself can reach"):
        interface_variables({"MASTER_ADDR": "127.0.1.1", **several})
    with pytest.raises(TopologyError, match=r"MASTER_ADDR=localhost is (127.0.0.1|::1) on .*/etc/hosts .*GLOO_SOCKET"):
        interface_variables({"MASTER_ADDR": "localhost", **several})


@pytest.mark.parametrize(
    "one",
    [{}, {"CROSS_SIZE": "1", "SLURM_NNODES": "2"}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_NNODES": "2"},
     {"SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2"}, {"WORLD_SIZE": "1", "SLURM_NNODES": "2"}],
)  # fmt: skip
def test_nothing_on_one_node(one: dict[str, str]) -> None:
    assert interface_variables({"MASTER_ADDR": "127.0.0.1", **one}) == {}


def test_nothing_for_a_machine_that_plays_several_under_torchrun() -> None:
    played = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "1"}
    for master in ("127.0.0.1", "localhost"):
        assert interface_variables({"MASTER_ADDR": master, **played}) == {}


def test_nothing_where_the_address_says_nothing() -> None:
    for environment in (TWO_NODES, {"MASTER_ADDR": "no.such.host.invalid", **TWO_NODES}):
        assert interface_variables(environment) == {}
