"""Linears of a model that read one tensor (q, k and v; gate and up), and fusing their input projections."""

from collections.abc import Iterator

from torch import nn

from malora_dist.adapters.input_projection import FusedProjection
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.shared_input import SharedInput
from malora_dist.adapters.target_names import READERS


def fuse_input_projections(model: nn.Module) -> None:
    """Project the input of adapted linears that read one tensor by one product; they must have S_A and a router.

    Where their S_A have different ranks, each projects by its own.
    """
    for parent, name, layers in list(linears_by_input(model)):
        if len(layers) > 1 and len({layer.shared_r for layer in layers}) == 1:
            projections = [layer.input_projection for layer in layers]
            fused = FusedProjection(projections)
            # After the linears, so that their parameters go by the linears' names.
            parent.add_module(f"{name}_projection", fused)
            shared_input = SharedInput(projections, fused)
            for layer in layers:
                layer.shared_input = shared_input


def unfuse_input_projections(model: nn.Module) -> None:
    """Undo `fuse_input_projections`."""
    for parent, name, layers in list(linears_by_input(model)):
        shared_input = layers[0].shared_input
        if shared_input is not None and shared_input.fused is not None:
            delattr(parent, f"{name}_projection")
            for layer in layers:
                layer.shared_input = None


def linears_by_input(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[MixtureLinear]]]:
    """Yield the adapted linears that read one tensor, with their parent and a name of them in it."""
    for parent in model.modules():
        sets: dict[str, list[MixtureLinear]] = {}
        for leaf, child in parent.named_children():
            if isinstance(child, MixtureLinear):
                sets.setdefault(READERS.get(leaf, leaf), []).append(child)
        yield from ((parent, name, layers) for name, layers in sets.items())
