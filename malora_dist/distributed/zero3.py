"""ZeRO-3: parameters are partitioned, gathered, read and checked here, by DeepSpeed's attributes of them.

Under ZeRO-3 a parameter holds no data between uses: `ds_tensor` is this process's part,
`ds_numel` the number of all elements, `ds_process_group` the group it is spread over. All are in `deepspeed_names`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.distributed.deepspeed_names import check_names
from malora_dist.distributed.expert_groups import ExpertGroups, expert_parallel_group, is_slice
from malora_dist.distributed.process_groups import replicate
from malora_dist.errors import TopologyError
from malora_dist.ops.partitioned import is_partitioned, whole_numel, whole_shape


def partition_at_once(
    deepspeed_config: dict[str, Any], share: Callable[[list[nn.Parameter]], None] | None = replicate
) -> Callable[[list[nn.Parameter]], None]:
    """Return a placement for ZeRO-3: each parameter gets its value, and then every process keeps its part alone.

    Args:
        deepspeed_config: of the run.
        share: gives all processes one value; None where they have the same value already.
    """
    init = _partitioner(deepspeed_config)

    def place(parameters: list[nn.Parameter]) -> None:
        parameter: Any
        for parameter in parameters:
            parameter.data = parameter.data.to(init.local_device)
            if share is not None:
                share([parameter])
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()

    return place


def partition_parts(
    deepspeed_config: dict[str, Any],
) -> Callable[[tuple[int, ...], torch.dtype, Callable[[int, int], Tensor]], nn.Parameter]:
    """Return a placement for ZeRO-3 where each process reads its own part, and nothing is sent.

    The placement takes a shape, a dtype and `read_part(start, stop)`, which counts elements of the flat tensor. No
    memory is ever taken for the whole tensor. Not for parameters that DeepSpeed keeps on NVMe, where it must write the
    parts itself.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    init = _partitioner(deepspeed_config)

    def place(shape: tuple[int, ...], dtype: torch.dtype, read_part: Callable[[int, int], Tensor]) -> nn.Parameter:
        # One element under the whole shape, from which DeepSpeed takes shape, number of elements and dtype.
        whole = torch.empty((), dtype=dtype, device=init.local_device).expand(shape)
        parameter: Any = nn.Parameter(whole, requires_grad=False)
        init._convert_to_deepspeed_param(parameter)
        world_size, rank = parameter.ds_zero_partition_world_size, parameter.ds_zero_partition_rank
        size = parameter.aligned_size() // world_size
        start, stop = (min(edge * size, whole_numel(parameter)) for edge in (rank, rank + 1))
        part: Any = torch.zeros(size, dtype=dtype, device=init.remote_device)
        part = get_accelerator().pin_memory(part) if init.pin_memory else part
        part[: stop - start].copy_(read_part(start, stop))
        parameter.ds_tensor = part
        part.ds_numel, part.status, part.final_location = size, PartitionedParamStatus.AVAILABLE, None
        parameter.ds_numel_aligned = parameter.aligned_size()
        parameter.partition()
        result: nn.Parameter = parameter
        return result

    return place


def _partitioner(deepspeed_config: dict[str, Any]) -> Any:
    import deepspeed

    check_names("parallel.zero_stage=3")
    # Made around no parameters and not entered, since `with zero.Init():` patches constructors, which changes dtypes.
    return deepspeed.zero.Init(module=nn.ParameterList(), config_dict_or_path=deepspeed_config)


def mark_expert_parameter(parameter: nn.Parameter, groups: ExpertGroups) -> None:
    """Mark a slice of experts, so that ZeRO-3 partitions it over the expert-data-parallel group only.

    Its gradient is still averaged over the world, and its norm added up over the expert-parallel group. Without these
    marks DeepSpeed mixes different experts, without an error. Call it before anything is partitioned.
    """
    marks = {
        "allreduce": False,
        "group_name": groups.name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": groups.name,
        "ds_zero_partition_process_group": groups.expert_data_parallel,
    }
    for mark, value in marks.items():
        setattr(parameter, mark, value)


def check_partitioning(model: nn.Module, zero_stage: int, groups: ExpertGroups | None = None) -> None:
    """Check that every parameter is partitioned over the group it should be.

    At stage 3 that is the expert-data-parallel group for slices of experts, the world for everything else; below,
    none. DeepSpeed ignores marks that it does not know without an error, and mixes parameters up; hence the check.

    Raises:
        TopologyError: a parameter is partitioned over another group.
    """
    world = list(range(dist.get_world_size()))
    slices = {id(p) for _, layer in mixture_layers(model) if layer.dispatcher for p in (layer.expert_down, layer.B)}
    for name, parameter in model.named_parameters():
        group = getattr(parameter, "ds_process_group", None)
        partitioned = group is not None
        if partitioned != (zero_stage == 3):
            raise TopologyError(
                f"{name} is {'' if partitioned else 'not '}partitioned at parallel.zero_stage={zero_stage}"
            )
        if not partitioned:
            continue
        wanted = world
        if id(parameter) in slices:
            assert groups is not None, "experts are dispatched without expert groups"
            wanted = dist.get_process_group_ranks(groups.expert_data_parallel)
        ranks = dist.get_process_group_ranks(group)
        if ranks != wanted:
            raise TopologyError(f"{name} is partitioned over ranks {ranks}, it belongs on {wanted}")


def flat_place(optimizer: Any, parameter: Any) -> tuple[Tensor, int, int]:
    """Return the flat fp32 tensor that holds this process's part of a trained parameter, and where in it, at stage 3.

    Returns:
        The tensor, which the optimizer inside of DeepSpeed's updates, the part's first element, and its size.
    """
    group, first, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[group], first, numel


def flat_masters(optimizer: Any) -> list[Tensor]:
    """Return this process's flat fp32 tensors, which the optimizer inside of DeepSpeed's updates, at stage 3."""
    masters: list[Tensor] = optimizer.fp32_partitioned_groups_flat
    return masters


def partition_rank(parameter: Any) -> int:
    """Return this process's rank in the group over which a parameter is partitioned."""
    return dist.get_rank(parameter.ds_process_group)


def own_part(parameter: Any) -> tuple[int, int, int]:
    """Return which elements of a partitioned parameter this process keeps.

    Returns:
        The first, the one after the last, and the size of the part, which is filled up so that all parts have one size.
    """
    size, rank = parameter.ds_tensor.numel(), partition_rank(parameter)
    start, stop = (min(edge * size, whole_numel(parameter)) for edge in (rank, rank + 1))
    return start, stop, size


def gather_parts(parameter: Any, own_KN: Tensor) -> list[Tensor]:
    """Join K tensors of which each process has a part of N elements, as of the partitioned parameter, by one message.

    Returns:
        The tensors, shaped like the whole parameter.
    """
    group = parameter.ds_process_group
    parts = [torch.empty_like(own_KN) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own_KN, group=group)
    whole = torch.cat(parts, dim=1)[:, : whole_numel(parameter)]
    return [row.view(whole_shape(parameter)) for row in whole]


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of parameters that this process keeps, by kind: `base` and `adapter`."""
    adapters = {id(parameter) for _, parameter in adapter_parameters(model)}
    total = {"base": 0, "adapter": 0}
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter)
        total["adapter" if id(parameter) in adapters else "base"] += part.numel() * part.element_size()
    return total


def gathered(module: nn.Module) -> AbstractContextManager[object]:
    """Gather a module's parameters while the context is open. Every process must open it."""
    import deepspeed

    parameters = list(module.parameters())
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        parameters, enabled=any(is_partitioned(parameter) for parameter in parameters)
    )
    return context


def gathered_adapter_state(model: nn.Module, *, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole tensor (on the CPU) of every adapter parameter, gathering one layer at a time.

    Slices of experts are joined in the order of their ranks. Every process must take part to the end.

    Args:
        model: with adapters.
        keep: False on a process that only helps the others to gather: it copies nothing and yields nothing.
    """
    import deepspeed

    for name, layer in mixture_layers(model):
        own = dict(layer.factors())
        partitioned = any(is_partitioned(parameter) for parameter in own.values())
        with deepspeed.zero.GatheredParameters(list(own.values()), enabled=partitioned):
            joined = ((f"{name}.{factor}", gather_experts(p, p.detach())) for factor, p in own.items())
            tensors = [(full_name, tensor.to("cpu", copy=True)) for full_name, tensor in joined if keep]
        yield from tensors


def gather_experts(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Join the slices of all expert ranks, if `parameter` is one of experts; else return the tensor itself."""
    if not is_slice(parameter):
        return tensor
    group = expert_parallel_group(parameter)
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts)
