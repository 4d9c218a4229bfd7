"""Observing and replacing what routers decide, from outside the model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.fused_projections import fuse_input_projections, unfuse_input_projections
from malora_dist.ops.routing import Routing

# (layer, its input (T, I), what its router decided) -> what its experts get
Decide = Callable[[str, Tensor, Routing], Routing]


@contextmanager
def deciding(model: nn.Module, decide: Decide) -> Iterator[None]:
    """Let `decide` change every routing of the model's adapted layers within the block."""

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None, Routing | None]) -> Any:
            x_TI, h, routing = output
            return x_TI, h, None if routing is None else decide(name, inputs[0], routing)

        return hook

    fused = any(layer.shared_input is not None for _, layer in mixture_layers(model))
    unfuse_input_projections(model)
    handles = [layer.input_projection.register_forward_hook(hook_of(name)) for name, layer in mixture_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if fused:
            fuse_input_projections(model)


@contextmanager
def constant_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Give every token of a layer the same gates (E,) within the block, whatever its router says."""

    def decide(layer: str, x_TI: Tensor, routing: Routing) -> Routing:
        g_TE = gates[layer].to(routing.probs_TE).expand(len(x_TI), -1)
        ids_TE = torch.arange(g_TE.shape[1], device=g_TE.device).expand_as(g_TE)
        return Routing(g_TE, ids_TE, g_TE)

    with deciding(model, decide):
        yield


class Replay:
    """Routings written down in one pass over some rows, and given again in the same order in another.

    Two forms of one adapter round differently, so a token on the border of two experts may fall to either side. To
    compare their sums, both must be of the same experts.
    """

    def __init__(self) -> None:
        self.routings: list[Routing] = []

    def record(self, layer: str, x_TI: Tensor, routing: Routing) -> Routing:
        """Keep the routing that the router computed, and return it. It is a `Decide`."""
        self.routings.append(routing)
        return routing

    def repeat(self, layer: str, x_TI: Tensor, routing: Routing) -> Routing:
        """Return the next routing that was kept. It is a `Decide`."""
        return self.routings.pop(0)


@contextmanager
def static_lora(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Replace each adapted layer by its base plus B A x within the block; factors are (A (R, I), B (O, R)) by layer."""

    def hook_of(A_RI: Tensor, B_OR: Tensor) -> Callable[..., Tensor]:
        return lambda _, inputs, output: output + F.linear(F.linear(inputs[0], A_RI), B_OR)

    layers = dict(mixture_layers(model))
    assert layers.keys() == factors.keys()
    handles = [layers[name].register_forward_hook(hook_of(*pair)) for name, pair in factors.items()]
    for layer in layers.values():
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.adapter_enabled = True
