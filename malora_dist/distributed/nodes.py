"""The processes that share a machine: one of them reads what all of them need."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from malora_dist.distributed.process_groups import World, broadcast_values, gather_lists


@dataclass(frozen=True)
class Node:
    """The ranks on this process's machine, and their group; the first of them reads."""

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def reader_rank(self) -> int:
        return self.ranks[0]

    def share(self, parameters: list[nn.Parameter]) -> None:
        """Give every process of the node the values of its reader. Nothing leaves the machine."""
        broadcast_values(parameters, self.reader_rank, self.group)


def this_node(world: World, timeout_seconds: float, node_of_rank: Sequence[str] | None = None) -> Node:
    """The node of this process, by the machines' host names unless `node_of_rank` names every rank's node.

    Machines that give themselves one name count as one node, which is slower and not wrong. Every process must call.
    """
    nodes = gather_lists([socket.gethostname()]) if node_of_rank is None else list(node_of_rank)
    own = nodes[world.rank]
    for name in dict.fromkeys(nodes):
        ranks = [rank for rank, node in enumerate(nodes) if node == name]
        # new_group is called by all processes for all groups, in the same order.
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_seconds)) if len(ranks) < world.size else None
        if name == own:
            result = Node(tuple(ranks), group)
    return result
