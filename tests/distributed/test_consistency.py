"""Checks at the start: what processes say of themselves, and a folder that all nodes see."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from malora_dist import __version__
from malora_dist.distributed.consistency import RECIPE, _different_facts, _unlike_nodes, start_facts
from tests.distributed.consistency_workers import BLOCKS, results


def alike(name: str) -> Any:
    """What all ranks say, which must be the same."""
    found = [rank[name] for rank in results()]
    assert found == found[:1] * 4, found
    return found[0]


@pytest.mark.distributed
def test_processes_alike() -> None:
    assert alike("alike") == BLOCKS
    assert alike("host") == 1


@pytest.mark.distributed
def test_a_fact_that_differs_between_nodes() -> None:
    kind, message = alike("nodes differ")
    assert kind == "TopologyError"
    assert message == (
        "torch differs between nodes: 2.12.0 on node1; 2.13.0 on node2. "
        "Install the same torch on all, or use one environment that all nodes share"
    )


@pytest.mark.distributed
def test_a_fact_that_differs_within_nodes() -> None:
    assert "0 on node1 (rank 0), node2 (rank 2); 1 on node1 (rank 1), node2 (rank 3)." in alike("ranks differ")[1]


@pytest.mark.distributed
def test_a_fact_that_a_process_lacks() -> None:
    assert "x differs between nodes: 1 on n1, n2, n3; nothing on n0." in alike("one lacks")[1]


@pytest.mark.distributed
def test_nodes_with_unlike_numbers_of_processes() -> None:
    kind, message = alike("uneven")
    assert kind == "TopologyError"
    assert message.startswith("processes differ between nodes: 3 on node1; 1 on node2. Every node must")
    assert "--gpus-per-node, not --gpus" in message and "--ntasks-per-node" in message and "slots" in message


@pytest.mark.distributed
def test_all_that_is_wrong_is_said_at_once() -> None:
    assert [line.split()[0] for line in alike("both")[1].split("\n")] == ["torch", "processes"]


@pytest.mark.distributed
def test_a_folder_that_all_nodes_see() -> None:
    assert alike("folder shared") is None
    assert alike("folder run is there") is None


@pytest.mark.distributed
def test_a_folder_that_a_node_does_not_see() -> None:
    kind, message = alike("folder other")
    assert kind == "TopologyError"
    wrote = r"node1 wrote (/\S+)/own/runs/(\.malora-\w+), which node2 does not see, looking for \1/runs/\2: "
    assert re.search(r"output_dir=runs/one is not on a file system that all nodes share: " + wrote, message), message
    assert all(1 <= rank["folder seconds"] < 10 for rank in results())


@pytest.mark.distributed
def test_a_folder_that_cannot_be_written() -> None:
    kind, message = alike("folder not writable")
    assert kind == "ConfigError"
    assert message.startswith("output_dir=/proc/runs/one: /proc cannot be written: ")


@pytest.mark.distributed
def test_a_file_in_the_way_is_for_the_session_to_say() -> None:
    assert alike("folder is a file") is None


@pytest.mark.distributed
def test_on_one_node_nothing_is_written() -> None:
    assert alike("folder one node") is None


@pytest.mark.distributed
def test_nothing_is_left_behind() -> None:
    assert alike("folder left") == ["file", "own", "own/runs"]


def test_facts_of_this_process() -> None:
    facts = start_facts("a: 1\n")
    assert facts["torch"] == torch.__version__ and facts["malora_dist"] == __version__
    assert facts == start_facts("a: 1\n")
    assert start_facts("a: 2\n")[RECIPE] != facts[RECIPE]


@pytest.mark.parametrize("odd", [1, 3])
def test_of_a_thousand_nodes_a_few_are_named(odd: int) -> None:
    nodes: Sequence[str] = [f"node{number}" for number in range(1000)]
    facts = [{"torch": "2.12.0" if rank % 1000 < odd else "2.13.0"} for rank in range(1000)]
    (message,) = _different_facts(facts, nodes)
    assert f"; 2.12.0 on {', '.join(nodes[:odd])}. " in message and f"and {1000 - odd - 8} more; " in message
    assert len(message) < 300
    (message,) = _unlike_nodes([*nodes, *nodes[odd:]])
    assert f"and {1000 - odd - 8} more; 1 on {', '.join(nodes[:odd])}. " in message
