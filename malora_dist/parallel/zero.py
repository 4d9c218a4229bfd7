"""What the package knows of DeepSpeed's insides; nothing else reads its private attributes.

Tested with DeepSpeed 0.19.8. Under ZeRO-3 a parameter holds no data between uses: `ds_tensor` is this process's part,
`ds_numel` the number of all elements, `ds_process_group` the group it is spread over.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.errors import TopologyError
from malora_dist.nn.inject import adapter_parameters, mixture_layers


def partition_at_once(deepspeed_config: dict[str, Any]) -> Callable[[list[nn.Parameter]], None]:
    """Placement for ZeRO-3: each parameter is broadcast from the main process and partitioned, one after another."""
    import deepspeed

    def place(parameters: list[nn.Parameter]) -> None:
        # A plain list of parameters, and not `with zero.Init():`, whose patched constructors change dtypes.
        deepspeed.zero.Init(module=nn.ParameterList(parameters), config_dict_or_path=deepspeed_config)

    return place


def check_partitioning(model: nn.Module, zero_stage: int) -> None:
    """Raise TopologyError unless every parameter is spread over exactly the group it should be: the world, at stage 3.

    DeepSpeed ignores marks that it does not know without an error, and mixes parameters up; hence the check.
    """
    world = list(range(dist.get_world_size()))
    for name, parameter in model.named_parameters():
        group = getattr(parameter, "ds_process_group", None)
        partitioned = group is not None
        if partitioned != (zero_stage == 3):
            raise TopologyError(
                f"{name} is {'' if partitioned else 'not '}partitioned at parallel.zero_stage={zero_stage}"
            )
        ranks = dist.get_process_group_ranks(group) if partitioned else world
        if ranks != world:
            raise TopologyError(f"{name} is partitioned over ranks {ranks}, it belongs on {world}")


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters this process keeps, by kind: `base` and `adapter`."""
    adapters = {id(parameter) for _, parameter in adapter_parameters(model)}
    total = {"base": 0, "adapter": 0}
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter)
        total["adapter" if id(parameter) in adapters else "base"] += part.numel() * part.element_size()
    return total


def gathered_adapter_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor (on the CPU) of every adapter parameter, one layer gathered at a time.

    Every process must take part to the end.
    """
    import deepspeed

    for name, layer in mixture_layers(model):
        own = dict(layer.named_parameters(recurse=False))
        partitioned = any(hasattr(parameter, "ds_id") for parameter in own.values())
        with deepspeed.zero.GatheredParameters(list(own.values()), enabled=partitioned):
            tensors = {f"{name}.{factor}": p.detach().to("cpu", copy=True) for factor, p in own.items()}
        yield from tensors.items()


def gradient_norm_before_step(parameters: list[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients at ZeRO stage 0, where DeepSpeed clips without telling the norm."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
