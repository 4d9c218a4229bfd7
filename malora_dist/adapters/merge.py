"""Adding an adapter into the weights of its base, where one weight can be equal to it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from malora_dist.adapters.layer import MixtureLinear
from malora_dist.errors import ConfigError
from malora_dist.models.linears import is_conv1d


def merged_weight(weight_OI: Tensor, factors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Compute W + s B A (O, I) in fp32 or better, with `magnitude` (O,) m each row scaled to norm m.

    Args:
        weight_OI: W.
        factors: B (1, O, R), A (1, R, I) or P (1, R, D) and shared_A (D, I) with A = P S_A, or shared_A alone as A.
        scaling: s.
    """
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    merged_OI = torch.addmm(weight_OI.to(wide), factors["B"][0].to(wide), _down(factors).to(wide), alpha=scaling)
    if "magnitude" in factors:
        norm_O = merged_OI.norm(dim=1).clamp(min=torch.finfo(wide).tiny)
        merged_OI *= (factors["magnitude"].to(wide) / norm_O)[:, None]
    return merged_OI


def _down(factors: Mapping[str, Tensor]) -> Tensor:
    """Return the one expert's down-projection (R, I)."""
    if "A" in factors:
        return factors["A"][0]
    return factors["P"][0] @ factors["shared_A"] if "P" in factors else factors["shared_A"]


def check_mergeable(model: nn.Module, layers: Mapping[str, MixtureLinear]) -> None:
    """Raise ConfigError unless every layer of a model is equal to a linear with another weight."""
    for name, layer in layers.items():
        if layer.num_experts > 1:
            raise ConfigError(
                f"{name} has num_experts={layer.num_experts}: its router weighs the experts anew for every token, so "
                "no one weight is equal to them. Only adapters with one expert are merged"
            )
        weight = layer.base_layer._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.dim() != 2:
            raise ConfigError(
                f"{name} is a {type(layer.base_layer).__name__}, whose weight is quantised: with the adapter in it, it "
                "would be rounded anew. Load the base without quantisation to merge"
            )
        if weight.is_meta or not weight.numel():
            raise ConfigError(f"{name}.weight is not in memory here: load the base whole to merge")
        for other, module in model.named_modules():
            if module is not layer.base_layer and any(one is weight for one in module._parameters.values()):
                raise ConfigError(f"{name} is tied to {other}, which a merge would change too")


@torch.no_grad()
def merge_layers(layers: Mapping[str, MixtureLinear]) -> None:
    """Set the weight of each layer's base to the merged one, rounded to its dtype.

    All are computed once before the first is written, so what fails leaves the base as it was. To keep them instead
    would need the memory of a second base.

    Raises:
        ConfigError: a merged weight is not finite in the dtype of the base.
    """
    for name, layer in layers.items():
        merged_OI = _merged(layer)
        if not torch.isfinite(merged_OI).all():
            raise ConfigError(f"{name}.weight is not finite in {merged_OI.dtype} with the adapter in it")
    for layer in layers.values():
        _weight(layer).copy_(_merged(layer))


def _merged(layer: MixtureLinear) -> Tensor:
    """Compute the merged weight (O, I) of a layer in the dtype of its base."""
    factors = {name: parameter.detach() for name, parameter in layer.factors()}
    return merged_weight(_weight(layer), factors, layer.scaling).to(_weight(layer).dtype)


def _weight(layer: MixtureLinear) -> Tensor:
    """Return the base's weight (O, I); of a Conv1D a view of it."""
    weight_OI = layer.base_layer.weight.T if is_conv1d(layer.base_layer) else layer.base_layer.weight
    assert isinstance(weight_OI, Tensor)
    return weight_OI
