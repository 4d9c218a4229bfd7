"""Which ranks hold which experts: the expert-parallel groups of DeepSpeed, checked against `config.topology`.

Its private functions and the mark of a slice are read here; all are in `deepspeed_names`.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from malora_dist.config.topology import expert_data_parallel_ranks, expert_parallel_ranks, local_experts
from malora_dist.distributed.deepspeed_names import check_names
from malora_dist.distributed.process_groups import set_timeouts
from malora_dist.errors import TopologyError


@dataclass(frozen=True)
class ExpertGroups:
    """This process's two groups.

    Attributes:
        expert_parallel: neighbours that together hold every expert once, and exchange tokens.
        expert_data_parallel: the processes that hold the same experts, and average their gradients.
        name: DeepSpeed's name of both, `ep_size_<n>`.
    """

    ep_size: int
    name: str
    expert_parallel: dist.ProcessGroup
    expert_data_parallel: dist.ProcessGroup

    def local_experts(self, num_experts: int) -> range:
        """Return the global numbers of this process's experts."""
        return local_experts(dist.get_rank(), self.ep_size, num_experts)


def create_expert_groups(ep_size: int, timeout_seconds: float) -> ExpertGroups | None:
    """Create the groups for experts spread over `ep_size` processes; None for 1. Every process must call it.

    Raises:
        TopologyError: ep_size does not divide the processes, or DeepSpeed groups other ranks than `config.topology`.
    """
    if ep_size == 1:
        return None
    from deepspeed.utils import groups

    check_names("parallel.ep_size above 1")
    world_size = dist.get_world_size()
    wanted = expert_parallel_ranks(world_size, ep_size), expert_data_parallel_ranks(world_size, ep_size)
    groups._create_expert_and_data_parallel(ep_size)
    set_timeouts(timeout_seconds)
    name = f"ep_size_{ep_size}"
    found = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    for group, sets in zip(found, wanted, strict=True):
        ranks = dist.get_process_group_ranks(group)
        if ranks not in sets:
            raise TopologyError(f"DeepSpeed groups ranks {ranks} for parallel.ep_size={ep_size}, not one of {sets}")
    return ExpertGroups(ep_size, name, *found)


def is_slice(parameter: Tensor) -> bool:
    """Return whether the parameter is marked as a slice of experts (`zero3.mark_expert_parameter`)."""
    return hasattr(parameter, "group_name")


def expert_parallel_group(parameter: Any) -> dist.ProcessGroup:
    """Return the processes that together hold every expert of a slice of them."""
    from deepspeed.utils import groups

    group: dist.ProcessGroup = groups._get_expert_parallel_group(parameter.group_name)
    return group
