"""Several adapters of one model: the layers of one are in the model, those of the others are kept beside it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from malora_dist.adapters.adapted_layers import Injected, injected_adapters, mixture_layers
from malora_dist.adapters.fused_projections import fuse_input_projections, unfuse_input_projections
from malora_dist.adapters.inject import inject_adapters, places_of_modules
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.malora_config import MaloraConfig
from malora_dist.adapters.recompute import DeferredBalance
from malora_dist.adapters.saving import forget_adapters, save_adapters_of
from malora_dist.adapters.target_names import ALL_LINEAR, DEFAULT_TARGETS
from malora_dist.adapters.targets import all_linear
from malora_dist.errors import ConfigError, short


@dataclass
class Parked:
    """An adapter that is not in the model: its layers, without the linears they are for, by these linears' names."""

    injected: Injected
    layers: dict[str, MixtureLinear]


class NamedAdapters:
    """The adapters of a model by name. Adapters may differ in everything: method, numbers, targets.

    Attributes:
        configs: of each adapter.
        active: the name of the one in the model.
        parked: the others.
        trained: parameters of the base that were trained before it had adapters.
        announced: whether the model's config tells of the balance loss (`router_config`).
    """

    def __init__(self) -> None:
        self.configs: dict[str, MaloraConfig] = {}
        self.active = ""
        self.parked: dict[str, Parked] = {}
        self.trained: tuple[str, ...] = ()
        self.announced = False

    @property
    def config(self) -> MaloraConfig:
        """That of the active adapter."""
        return self.configs[self.active]

    def add(self, model: nn.Module, name: str, config: MaloraConfig, init_weights: bool = True) -> None:
        """Put a new adapter into the model and make it the active one. What fails leaves the model as it was."""
        if name in self.configs:
            raise ConfigError(f"adapter_name={short(name)} is the name of an adapter that the model has already")
        if not name or "/" in name or name in (".", ".."):
            raise ConfigError(f"adapter_name={short(name)} must be a name that a folder can have")
        former = self.active
        if former:
            self._park(model)
        try:
            inject_config(model, config, init_weights)
        except BaseException:
            if former:
                self._unpark(model, former)
            raise
        injected = injected_adapters(model)
        assert injected is not None
        # Of the first adapter; the base is frozen for those that follow.
        self.trained = self.trained or injected.trained
        self.configs[name], self.active = config, name

    def activate(self, model: nn.Module, name: str) -> None:
        """Put this adapter's layers into the model, in the place of those of the active one."""
        self.check(name)
        if name != self.active:
            self._park(model)
            self._unpark(model, name)

    def delete(self, model: nn.Module, name: str) -> None:
        """Remove an adapter; if it is the active one, the first of the others becomes active."""
        self.check(name)
        others = [other for other in self.configs if other != name]
        if not others:
            raise ConfigError(f"adapter_name={short(name)} is the only adapter; unload() gives the model back")
        if name == self.active:
            self.activate(model, others[0])
        del self.configs[name], self.parked[name]

    def check(self, name: str) -> None:
        """Raise ConfigError for a name that no adapter has."""
        if name not in self.configs:
            raise ConfigError(f"adapter_name={short(name)} must be one of {', '.join(self.configs)}")

    def layers(self, model: nn.Module, name: str) -> dict[str, MixtureLinear]:
        """Return an adapter's layers by the names of the linears they are for."""
        self.check(name)
        return dict(mixture_layers(model)) if name == self.active else self.parked[name].layers

    def injected(self, model: nn.Module, name: str) -> Injected:
        """Return the info that an adapter's folder will hold."""
        found = injected_adapters(model) if name == self.active else self.parked[name].injected
        assert found is not None
        return found

    def parked_layers(self) -> Iterator[MixtureLinear]:
        """Yield every layer that is not in the model."""
        for parked in self.parked.values():
            yield from parked.layers.values()

    def _park(self, model: nn.Module) -> None:
        injected = injected_adapters(model)
        assert injected is not None
        unfuse_input_projections(model)
        places, layers = places_of_modules(model), dict(mixture_layers(model))
        for layer in layers.values():
            for parent, leaf in places[id(layer)]:
                setattr(parent, leaf, layer.base_layer)
            layer.routing, layer.routings, layer._modules["base_layer"] = None, None, None
        forget_adapters(model)
        self.parked[self.active] = Parked(injected, layers)
        self.active = ""

    def _unpark(self, model: nn.Module, name: str) -> None:
        parked, places = self.parked.pop(name), places_of_modules(model)
        for layer_name, layer in parked.layers.items():
            base = model.get_submodule(layer_name)
            layer.base_layer = base
            layer.train(base.training)
            for parent, leaf in places[id(base)]:
                setattr(parent, leaf, layer)
        config = self.configs[name]
        if config.fuse_projections and config.spec.shared_r is not None:
            fuse_input_projections(model)
        save_adapters_of(model, parked.injected)
        self.active = name


def inject_config(model: Any, config: MaloraConfig, init_weights: bool = True) -> None:
    """Put adapters on a model by a config. Raises ConfigError as `inject_adapters` does."""
    targets = config.target_modules if config.target_modules is not None else _default_targets(model)
    inject_adapters(
        model,
        config.spec,
        targets,
        narrowing=config.narrowing,
        lora_dropout=config.lora_dropout,
        computation=config.computation,
        fuse_projections=config.fuse_projections,
        seed=config.seed,
        init_weights=init_weights,
    )
    model.injected_adapters = replace(model.injected_adapters, settings=config.settings)
    for _, layer in mixture_layers(model):
        if layer.balanced:
            layer.deferred_balance = DeferredBalance()


def _default_targets(model: nn.Module) -> tuple[str, ...]:
    leaves = {name.rpartition(".")[2] for name in all_linear(model)}
    return DEFAULT_TARGETS if leaves.issuperset(DEFAULT_TARGETS) else (ALL_LINEAR,)
