"""The processes of one machine: one of them reads what all of them need."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from malora_dist.distributed.process_groups import World, broadcast_values, gather_lists


@dataclass(frozen=True)
class Node:
    """The ranks on this process's machine, and their group (None: the default one). The first of them reads."""

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def reader_rank(self) -> int:
        """Return the rank that reads for this machine."""
        return self.ranks[0]

    def share(self, parameters: list[nn.Parameter]) -> None:
        """Copy the reader's values to every process of the node. Nothing leaves the machine."""
        broadcast_values(parameters, self.reader_rank, self.group)


def this_node(world: World, timeout_seconds: float, node_of_rank: Sequence[str] | None = None) -> Node:
    """Group the processes by machine, and return the node of this one. Every process must call.

    Machines with the same host name count as one node, which is slower and not wrong.

    Args:
        world: this process's rank.
        timeout_seconds: of the groups.
        node_of_rank: a name for every rank's node in place of its host name.
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
