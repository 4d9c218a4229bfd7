"""What is on a model with adapters: its adapted layers, their parameters, and what `inject_adapters` was given."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.partitioned import whole_numel


@dataclass(frozen=True)
class Injected:
    """What `inject_adapters` put on a model, and the parameters of the base that it froze.

    settings: those of `AdapterInfo`, for the folder that is written.
    """

    spec: MixtureSpec
    target_modules: tuple[str, ...]
    lora_dropout: float
    trained: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def injected_adapters(model: nn.Module) -> Injected | None:
    """Return what `inject_adapters` put on this model, None without adapters."""
    found = getattr(model, "injected_adapters", None)
    return found if isinstance(found, Injected) else None


def mixture_layers(model: nn.Module) -> Iterator[tuple[str, MixtureLinear]]:
    """Yield name and layer of every adapted linear, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureLinear):
            yield name, module


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of every adapter tensor, such as `model.layers.0.mlp.up_proj.shared_A`."""
    for name, layer in mixture_layers(model):
        for factor, parameter in layer.factors():
            yield f"{name}.{factor}", parameter


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return every adapter tensor by name, detached. Under ZeRO-3 gather them first (`distributed.zero3`)."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(model)}


def count_base_parameters(model: nn.Module) -> int:
    """Count the weights of the base; a packed 4-bit weight counts as the weights that it holds."""
    total = 0
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
    packed = {id(p) for m in model.modules() if isinstance(m, NF4Linear) for p in m.parameters()}
    adapters = {id(p) for _, p in adapter_parameters(model)}
    return total + sum(_numel(p) for p in model.parameters() if id(p) not in packed | adapters)


def _numel(parameter: nn.Parameter) -> int:
    """Return the weights that a parameter stands for, also where bitsandbytes has packed or ZeRO-3 spread them."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(shape) if shape is not None else whole_numel(parameter)
