"""Puts adapters on a model, and takes them off."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from malora_dist.adapters.adapted_layers import Injected, count_base_parameters, mixture_layers
from malora_dist.adapters.fused_projections import fuse_input_projections, unfuse_input_projections
from malora_dist.adapters.layer import MixtureLinear, require_triton
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.parameter_counts import count_parameters
from malora_dist.adapters.saving import release, save_adapters_of
from malora_dist.adapters.target_names import ALL_LINEAR, DEFAULT_TARGETS, EVERYTHING, READERS, Narrowing, is_pattern
from malora_dist.adapters.targets import find_targets, fused_experts, plain_names
from malora_dist.errors import ConfigError
from malora_dist.models.bitsandbytes_cpu import keep_differentiable
from malora_dist.models.linears import linear_sizes
from malora_dist.models.nf4_linear import NF4Linear


@dataclass(frozen=True)
class InjectionRow:
    """Adapted modules of one name and size: their number and trainable parameters."""

    target: str
    modules: int
    in_features: int
    out_features: int
    trainable_parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """The result of `inject_adapters`. `target_modules` are name suffixes, as in PEFT's adapter_config.json."""

    rows: tuple[InjectionRow, ...]
    trainable_parameters: int
    base_parameters: int
    adapted_parameters: int
    quantized_parameters: int
    target_modules: tuple[str, ...] = ()
    fused_experts: tuple[str, ...] = ()


def inject_adapters(
    model: nn.Module,
    spec: MixtureSpec,
    target_modules: Sequence[str] | str = DEFAULT_TARGETS,
    *,
    narrowing: Narrowing = EVERYTHING,
    lora_dropout: float = 0.0,
    computation: str = "auto",
    fuse_projections: bool = False,
    seed: int = 0,
    init_weights: bool = True,
    place: Callable[[MixtureLinear], None] | None = None,
    whole: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> InjectionReport:
    """Freeze `model` and wrap each linear that `target_modules` means in a MixtureLinear, in place.

    A target is the end of a name, a regular expression for whole names, or `all-linear` (`adapters.targets`);
    `narrowing` leaves out some of what they match. Each layer gets `spec.of_layer(its name)`. A model of transformers
    then saves its adapter alone, wherever transformers would save the model.

    Adapters are fp32, built on the device of the layer they wrap. Their initial values depend on the seed and the
    module's name alone, so every process builds the same ones (DoRA's magnitude depends on the base's weight too, which
    `whole(base_layer)` must show whole while it is measured). With `fuse_projections`, linears that read one tensor
    project together (`adapters.fused_projections`), where the method has an S_A. `place` then decides what of a layer
    stays on this process, before the next layer is built; the report counts whole layers all the same. Without
    `init_weights` no initial value is computed: the factors are memory that the caller must fill, every one.

    Raises ConfigError if `computation` is grouped_triton where Triton cannot run, if the model has adapters already, or
    if a target matches nothing or matches a module that is not a linear. After an error, whatever it was, the model is
    as it was before. Experts that a model keeps as one parameter are no linears; the report names them.
    """
    _refuse_second(model)
    if computation == "grouped_triton" and spec.structure.routed:
        require_triton(next(model.parameters()).device)
    targets = (target_modules,) if isinstance(target_modules, str) else target_modules
    matches = find_targets(model, targets, spec, narrowing)
    names = plain_names(model, matches, narrowed=narrowing != EVERYTHING)
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    experts = tuple(fused_experts(model))
    try:
        save_adapters_of(model, Injected(spec, names, lora_dropout, trained))
        model.requires_grad_(False)
        base_parameters = count_base_parameters(model)
        quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
        places = places_of_modules(model)
        for name in (name for matched in matches.values() for name in matched):
            base = model.get_submodule(name)
            with whole(base) if spec.structure.magnitude else nullcontext():
                layer = _adapted(base, name, spec.of_layer(name), lora_dropout, computation, seed, init_weights)
            for parent, leaf in places[id(base)]:
                setattr(parent, leaf, layer)
            if place is not None:
                place(layer)
        rows = [row for target, matched in matches.items() for row in _rows(model, target, matched)]
        if fuse_projections and spec.shared_r is not None:
            fuse_input_projections(model)
        keep_differentiable(model)
    except BaseException:
        remove_adapters(model)
        raise
    return InjectionReport(
        rows=tuple(rows),
        trainable_parameters=sum(row.trainable_parameters for row in rows),
        base_parameters=base_parameters,
        adapted_parameters=sum(row.modules * row.in_features * row.out_features for row in rows),
        quantized_parameters=quantized,
        target_modules=names,
        fused_experts=experts,
    )


def layer_seed(seed: int, name: str) -> int:
    """Derive a 31-bit number from the run's seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big") >> 1


def _refuse_second(model: nn.Module) -> None:
    for name, layer in mixture_layers(model):
        raise ConfigError(
            f"the model has adapters: {name} is a {type(layer).__name__}. One set of adapters is trained, saved and "
            "balanced as a whole; malora_dist.adapters.inject.remove_adapters takes it off first"
        )


def places_of_modules(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return parents and names in them of every module by its id: one may stand in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for leaf, module in parent._modules.items():
            places.setdefault(id(module), []).append((parent, leaf))
    return places


def _adapted(
    base: nn.Module,
    name: str,
    spec: MixtureSpec,
    dropout: float,
    computation: str,
    seed: int,
    init_weights: bool,
) -> MixtureLinear:
    parent_name, _, leaf = name.rpartition(".")
    sizes = linear_sizes(base)
    assert sizes is not None
    with torch.device(_device(base)):
        layer = MixtureLinear(
            base,
            spec,
            in_features=sizes[0],
            out_features=sizes[1],
            dropout=dropout,
            computation=computation,
            input_salt=layer_seed(seed, f"{parent_name}:{READERS.get(leaf, leaf)}"),
            generator=torch.Generator("cpu").manual_seed(layer_seed(seed, name)),
            init_weights=init_weights,
        )
    return layer.train(base.training)


def _device(base: nn.Module) -> torch.device:
    """Return the device on which the layer computes.

    It is not always that of the weights: accelerate keeps those of a layer that it offloads on no device.
    """
    device = next(base.parameters()).device
    executes_on = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    return device if device.type != "meta" or executes_on is None else torch.device(executes_on)


def _rows(model: nn.Module, target: str, names: Sequence[str]) -> Iterator[InjectionRow]:
    """Yield the rows of a target, by size, and by the last part of the name where the target is none."""
    layers = dict(mixture_layers(model))
    modules, parameters = Counter[tuple[str, int, int]](), Counter[tuple[str, int, int]]()
    for name in names:
        layer = layers[name]
        shown = name.rpartition(".")[2] if target == ALL_LINEAR or is_pattern(target) else target
        kind = shown, layer.in_features, layer.out_features
        modules[kind] += 1
        parameters[kind] += count_parameters(layer.spec, layer.in_features, layer.out_features)
    for (shown, inputs, outputs), count in modules.items():
        yield InjectionRow(shown, count, inputs, outputs, parameters[shown, inputs, outputs])


def remove_adapters(model: nn.Module) -> None:
    """Replace every adapted layer by its base layer, so that the model is as `inject_adapters` was given it."""
    unfuse_input_projections(model)
    places = places_of_modules(model)
    for _, layer in list(mixture_layers(model)):
        for parent, leaf in places[id(layer)]:
            setattr(parent, leaf, layer.base_layer)
    release(model)
