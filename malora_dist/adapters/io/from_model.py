"""The adapter of a model in memory, written as an adapter folder."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import Injected, adapter_parameters, injected_adapters, mixture_layers
from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import AdapterInfo, save_adapter
from malora_dist.adapters.io.info import AnyPath
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.errors import CheckpointError


def save_model_adapter(
    model: nn.Module, folder: AnyPath, state_dict: Mapping[str, Tensor] | None = None
) -> AdapterInfo:
    """Write the adapter that is on a model, as `save_adapter` does.

    `state_dict`: values by the names of the model's parameters, where the model's own are in parts. Raises
    CheckpointError if there is no adapter, a value is not whole, or something else is trained too, which would be lost.
    """
    info = adapter_info(model)
    check_all_is_adapter(model)
    save_layers(folder, info, dict(mixture_layers(model)), dict(_values(model, state_dict)))
    return info


def adapter_info(model: nn.Module, injected: Injected | None = None) -> AdapterInfo:
    """Return the info of an adapter's folder, or of the adapter on the model if none is given.

    Raises CheckpointError if there is none.
    """
    found = injected_adapters(model) if injected is None else injected
    if found is None:
        raise CheckpointError(f"{type(model).__name__} has no adapters: inject_adapters or load_adapter put them on it")
    return AdapterInfo(
        spec=found.spec,
        target_modules=found.target_modules,
        base_model=str(getattr(model, "name_or_path", "")),
        lora_dropout=found.lora_dropout,
        settings=found.settings,
    )


def check_all_is_adapter(model: nn.Module) -> None:
    """Raise CheckpointError if something besides the adapter is trained: it was frozen, and unfrozen afterwards."""
    adapter = {id(parameter) for _, parameter in adapter_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
    if others:
        more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
        raise CheckpointError(
            f"{others[0]}{more} trained and no part of the adapter, and an adapter folder holds nothing else: save "
            "model.state_dict() with torch or safetensors, or freeze all of the base (requires_grad_(False)) to keep "
            "the adapter alone"
        )


def save_layers(
    folder: AnyPath,
    info: AdapterInfo,
    layers: Mapping[str, MixtureLinear],
    values: Mapping[str, Tensor],
) -> None:
    """Write the adapter of these layers by name. `values`: by `<layer>.<factor>`, where not the layers' own.

    Raises CheckpointError if a value is not whole.
    """
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        shapes = factor_shapes(layer.spec, layer.in_features, layer.out_features)
        for factor, parameter in layer.factors():
            key = f"{name}.{factor}"
            state[key] = values.get(key, parameter.detach())
            if tuple(state[key].shape) != shapes[factor]:
                raise CheckpointError(
                    f"{key} has shape {tuple(state[key].shape)} instead of {shapes[factor]}: it is spread over "
                    "processes; gather the weights and give them as state_dict"
                )
    save_adapter(folder, info, state, model_card(info, (), {}))


def _values(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every adapter tensor, out of a state dict if one is given."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in adapter_parameters(model):
        found = [alias for alias in names[id(parameter)] if state_dict is not None and alias in state_dict]
        if state_dict is not None and not found:
            raise CheckpointError(f"state_dict lacks {names[id(parameter)][0]}")
        yield name, parameter.detach() if state_dict is None else state_dict[found[0]]
