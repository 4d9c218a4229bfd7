"""Linears that read one tensor (q, k and v; gate and up) inputs together: one product for all S_A and routers."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from malora_dist.adapters.input_projection import InputProjection
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.protocols import ProjectedInput
from malora_dist.adapters.shared_input import SharedInput
from malora_dist.ops.input_projection import autocast, project
from malora_dist.ops.products import WeightCopies
from malora_dist.ops.routing import Routing, choose

# Linears of one parent module that read the same tensor.
READERS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


class FusedProjection(nn.Module):
    """The projections of L linears as one: x (T, I) -> x for their base layers, h (T, D) and routing of each.

    It holds the very parameters of the projections, which keep their names: files know nothing of it. A module of its
    own, because ZeRO-3 gathers weights module by module.
    """

    weight_copies: WeightCopies | None = None

    def __init__(self, projections: Sequence[InputProjection]) -> None:
        super().__init__()
        first = projections[0]
        for number, input_projection in enumerate(projections):
            assert (input_projection.dropout, input_projection.input_salt) == (first.dropout, first.input_salt)
            self.register_parameter(f"shared_A_{number}", input_projection.shared_A)
            self.register_parameter(f"gate_{number}", input_projection.gate)
        self.num_linears, self.top_k, self.normalize_gates = len(projections), first.top_k, first.normalize_gates
        self.dropout, self.input_salt = first.dropout, first.input_salt

    def forward(self, x_TI: Tensor, keys_T: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Routing]]:
        """As InputProjection.forward, for all."""
        L = self.num_linears
        downs, gates = ([self.get_parameter(f"{name}_{n}") for n in range(L)] for name in ("shared_A", "gate"))
        x_TI, h_TW, logits_TN = project(x_TI, downs, gates, keys_T, self.input_salt, self.dropout, self.weight_copies)
        routing = choose(logits_TN.unflatten(1, (L, -1)).transpose(0, 1), self.top_k, self.normalize_gates)
        routings = [Routing(*each) for each in zip(*(part_L.unbind() for part_L in routing), strict=True)]
        return x_TI, list(h_TW.chunk(L, dim=1)), routings


class Siblings:
    """Enters for the linear that comes first, and for the others of the same tensor with it."""

    def __init__(self, layers: Sequence[MixtureLinear], input_projection: FusedProjection) -> None:
        self.layers, self.input_projection = list(layers), input_projection
        self._shared = SharedInput(self.layers, self._enter)

    def project(self, layer: MixtureLinear, x: Tensor) -> ProjectedInput:
        """What `layer` makes of its input (..., I)."""
        return self._shared.take(layer, x)

    def _enter(self, x: Tensor) -> list[ProjectedInput]:
        first = self.layers[0]
        x_TI = autocast(x).reshape(-1, first.in_features)
        keys_T = first.input_projection.dropout_keys(x_TI, first.token_keys)
        base_TI, hs, routings = self.input_projection(x_TI, keys_T)
        return [ProjectedInput(base_TI, h_TD, routing) for h_TD, routing in zip(hs, routings, strict=True)]


def fuse_input_projections(model: nn.Module) -> None:
    """Let the adapted linears of each parent that read one tensor project together; they must have S_A and a router."""
    for parent, group, layers in list(linears_by_input(model)):
        if len(layers) > 1:
            input_projection = FusedProjection([layer.input_projection for layer in layers])
            # After the linears, so that their parameters go by the linears' names.
            parent.add_module(f"{group}_entrance", input_projection)
            siblings = Siblings(layers, input_projection)
            for layer in layers:
                layer.siblings = siblings


def unfuse_input_projections(model: nn.Module) -> None:
    """Undo `fuse_input_projections`."""
    for parent, group, layers in list(linears_by_input(model)):
        if layers[0].siblings is not None:
            delattr(parent, f"{group}_entrance")
            for layer in layers:
                layer.siblings = None


def linears_by_input(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[MixtureLinear]]]:
    """Every set of adapted linears that read one tensor, with their parent and a name of the set in it."""
    for parent in model.modules():
        sets: dict[str, list[MixtureLinear]] = {}
        for leaf, child in parent.named_children():
            if isinstance(child, MixtureLinear):
                sets.setdefault(READERS.get(leaf, leaf), []).append(child)
        yield from ((parent, group, layers) for group, layers in sets.items())
