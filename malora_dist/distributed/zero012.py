"""Slices of experts at ZeRO stages 0 to 2, which know DeepSpeed's own expert layers only.

Their optimizers reduce slices of experts over the right group if they are marked and an expert layer is seen. Marks,
what these stages cannot do, and a check are here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.distributed.expert_groups import ExpertGroups, is_slice
from malora_dist.distributed.process_groups import sum_over_processes
from malora_dist.errors import TopologyError


def parameter_groups(parameters: Sequence[nn.Parameter], groups: ExpertGroups | None) -> list[dict[str, Any]]:
    """Return parameters as groups for the optimizer; slices of experts are one of their own, named after their ranks.

    None is empty.
    """
    if groups is None:
        return [{"params": list(parameters)}]
    shared = [p for p in parameters if not is_slice(p)]
    slices = [p for p in parameters if is_slice(p)]
    found: list[dict[str, Any]] = [{"params": shared}, {"params": slices, "moe": True, "name": groups.name}]
    return [group for group in found if group["params"]]


@contextmanager
def showing_experts(model: nn.Module) -> Iterator[None]:
    """Let `deepspeed.initialize`, called within the block, see that some parameters are slices of experts.

    It hands the expert groups to its optimizer only if the model holds an instance of DeepSpeed's own MoE layer, of
    which it reads `num_experts` and nothing else. This instance holds no parameter and is removed afterwards.
    """
    from deepspeed.moe.layer import MoE

    class ExpertSign(MoE):
        def __init__(self, num_experts: int) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing: the groups exist."""

    model.add_module("expert_sign", ExpertSign(max(layer.num_experts for _, layer in mixture_layers(model))))
    try:
        yield
    finally:
        del model.expert_sign


def check_reduction(engine: Any, zero_stage: int, groups: ExpertGroups) -> None:
    """Raise TopologyError unless DeepSpeed will add up each gradient over the group it should.

    That is the expert-data-parallel group for slices of experts, the world for all else. At stages 1 and 2 the state
    of the optimizer must be spread over the same group.
    """
    own = dist.get_process_group_ranks(groups.expert_data_parallel)
    table = engine.optimizer.expert_dp_process_group if zero_stage else engine.expert_data_parallel_group
    if not engine.has_moe_layers or dist.get_process_group_ranks(table[groups.name]) != own:
        raise TopologyError(f"DeepSpeed does not know the expert groups at parallel.zero_stage={zero_stage}")
    if zero_stage and not engine.optimizer.contiguous_gradients:
        raise TopologyError("zero_optimization.contiguous_gradients=false mixes gradients of different experts")
    spread = _state_ranks(engine.optimizer) if zero_stage else {}
    slices = {
        id(p) for _, layer in mixture_layers(engine.module) if layer.dispatcher for p in (layer.expert_down, layer.B)
    }
    for name, parameter in adapter_parameters(engine.module):
        expert = id(parameter) in slices
        wanted = own if expert else list(range(dist.get_world_size()))
        marked = getattr(parameter, "group_name", None) if not getattr(parameter, "allreduce", True) else None
        if marked != (groups.name if expert else None):
            raise TopologyError(f"{name} is marked as of group {marked}, it belongs to ranks {wanted}")
        if zero_stage and parameter.requires_grad and spread.get(id(parameter)) != wanted:
            raise TopologyError(f"state of {name} is spread over {spread.get(id(parameter))}, it belongs on {wanted}")


def _state_ranks(optimizer: Any) -> dict[int, list[int]]:
    """Return the ranks over which the optimizer's state of each parameter is spread at stages 1 and 2, by `id`."""
    pairs = zip(optimizer.bit16_groups, optimizer.real_dp_process_group, strict=True)
    return {id(p): dist.get_process_group_ranks(group) for parameters, group in pairs for p in parameters}


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients at stage 0 to an L2 norm of at most `max_norm` (0: leave them), and return the norm before.

    Not DeepSpeed's own clipping, which does not return the norm, and which takes the mean over processes of norms that
    each miss the other processes' experts, so that it clips too little.
    """
    trained = [p for p in parameters if p.grad is not None]
    slices: list[Any] = [p for p in trained if is_slice(p)]
    square = _norm([p for p in trained if not is_slice(p)]) ** 2
    if slices:
        # Over the world, and not over each expert-parallel group by itself, so that all processes get the same bits.
        copies = dist.get_world_size(slices[0].ds_zero_partition_process_group)
        square = square + sum_over_processes(_norm(slices) ** 2) / copies
    norm = square.sqrt()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def flat_parts(optimizer: Any) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """Return, at stages 1 and 2, this process's part of each flat fp32 master and the parameters of that whole master.

    The optimizer inside of DeepSpeed's updates these parts.
    """
    return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))


def part_of(parameter: Any) -> tuple[int, int, int]:
    """Return where a parameter overlaps with this process's flat part, at stages 1 and 2.

    Returns:
        The first element in the part, the first in the parameter, and how many elements: 0 without an overlap.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, 0, 0
    return mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel


def add_up_parts(parameter: Any, tensor: Tensor) -> None:
    """Add a tensor up, in place, over the processes that share a parameter's optimizer state, at stages 1 and 2."""
    dist.all_reduce(tensor, group=parameter._dp_group)
