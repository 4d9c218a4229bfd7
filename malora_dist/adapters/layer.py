"""The adapted linear: a frozen base layer plus a mixture of low-rank experts."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.dora import DoRALayer
from malora_dist.adapters.input_projection import InputProjection, ProjectedInput
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.recompute import DeferredBalance, is_recomputing, note_missing_graph
from malora_dist.adapters.shared_input import Dispatcher, Prepared, SharedInput
from malora_dist.errors import ConfigError
from malora_dist.ops.choices import prefer_grouped
from malora_dist.ops.dense import dense_experts
from malora_dist.ops.devices import missing_for_triton
from malora_dist.ops.grouped import grouped_experts
from malora_dist.ops.init import kaiming_uniform, shared_subspace_init
from malora_dist.ops.products import WeightCopies
from malora_dist.ops.routing import Routing, largest


class MixtureLinear(nn.Module):
    """y = base(x) + s * sum_{t in top-k} g_t B_t C_t h, the layer of all methods (MALoRA eqs. 1, 5, 7).

    `spec` says which. MALoRA: h = S_A drop(x), C_t = P_t. HydraLoRA: h = S_A drop(x), no C_t, all experts. MoLoRA:
    h = drop(x), C_t = A_t. LoRA: one expert, no router; DoRA: LoRA, rescaled.

    The experts' stacked factors belong to this module, router and S_A to its `input_projection`, DoRA's norms to
    `dora`. All are fp32; products run in the dtype of x. `routing` keeps the last forward's decision, and `routings`,
    where it is a list, those of every call since (a tuple takes no more); `balanced` says whether they belong in the
    balance loss, and `deferred_balance` brings its gradient to layers that run without a graph at first.

    The base's output is added to in place, and so is the gradient of its input: hooks on the base must copy what they
    keep. With a `shared_input`, linears that read one tensor project it together, and its dispatcher, if there is one
    (`distributed.expert_parallel`), sends tokens to the ranks of their experts, of which this module then holds
    `num_local_experts`.

    DoRA's base must be whole and in memory here. Without `init_weights` the caller must fill the factors' memory.

    Shapes: x (..., I) -> (..., O).
    """

    routing: Routing | None
    weight_copies: WeightCopies | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        spec: MixtureSpec,
        *,
        in_features: int,
        out_features: int,
        dropout: float = 0.0,
        computation: str = "auto",
        input_salt: int = 0,
        generator: torch.Generator | None = None,
        init_weights: bool = True,
    ) -> None:
        super().__init__()
        self.base_layer, self.spec, self.computation = base_layer, spec, computation
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.top_k, self.r, self.shared_r = spec.num_experts, spec.top_k, spec.r, spec.shared_r
        structure = spec.structure
        self.routed, self.scaling = structure.routed, spec.scaling
        self.balanced = structure.sparse
        self.input_projection = InputProjection(in_features, spec, dropout=dropout, input_salt=input_salt)
        self.dora = DoRALayer(out_features) if structure.magnitude else None
        self.down_name = "A" if spec.shared_r is None else "P" if structure.expert_down else None
        B = nn.Parameter(torch.empty(spec.num_experts, out_features, spec.r, dtype=torch.float32))
        down = None
        if self.down_name is not None:
            down = nn.Parameter(
                torch.empty(spec.num_experts, spec.r, spec.expert_width(in_features), dtype=torch.float32)
            )
        self.set_experts(down, B)
        self.adapter_enabled = True
        self.shared_input: SharedInput | None = None
        self.routing = None
        self.routings: Sequence[Routing] | None = None
        self.deferred_balance: DeferredBalance | None = None
        if not self.B.is_meta and self.dora is not None:
            self.dora.measure(base_layer)
        if not self.B.is_meta and init_weights:
            self.reset_parameters(generator)
        if self.dora is not None:
            self.register_load_state_dict_post_hook(_measure_again)

    @property
    def expert_down(self) -> nn.Parameter | None:
        """Return the experts' down-projections: P (E, R, D), A (E, R, I) without S_A, or nothing."""
        return None if self.down_name is None else self.get_parameter(self.down_name)

    @property
    def dispatcher(self) -> Dispatcher | None:
        """Return what sends tokens to the ranks of their experts; None if this rank holds all experts."""
        return None if self.shared_input is None else self.shared_input.dispatcher

    @property
    def token_keys(self) -> Tensor | None:
        """Which tokens the next forward sees (`InputProjection`)."""
        return self.input_projection.token_keys

    @token_keys.setter
    def token_keys(self, keys_T: Tensor | None) -> None:
        self.input_projection.token_keys = keys_T

    @property
    def weight(self) -> Any:
        """Return the base's weight, for code that reads it; the experts are not in it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Return the base's bias, or None."""
        return self.base_layer.bias

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Pass a new `weight` to the base: transformers ties an output head to the embedding this way."""
        if name != "weight":
            super().register_parameter(name, param)
            return
        outputs = self.B.shape[1]
        if param is not None and param.shape[0] != outputs:
            raise ConfigError(
                f"a weight of {param.shape[0]} outputs is put on an adapted linear of {outputs}: resize a model before "
                "inject_adapters"
            )
        self.base_layer.register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, or a pickle: everything but what belongs to one forward."""
        deferred = None if self.deferred_balance is None else DeferredBalance()
        of_forward = {"routing": None, "routings": None, "weight_copies": None, "deferred_balance": deferred}
        return self.__dict__ | of_forward

    def set_experts(self, down: nn.Parameter | None, B: nn.Parameter) -> None:
        """Hold these experts, all or a slice of them."""
        if self.down_name is not None:
            setattr(self, self.down_name, down)
        self.B = B
        self.num_local_experts = len(B)
        self.expert_width = self.r if down is None else down.shape[2]

    @property
    def form(self) -> str:
        """Return how this rank's experts are summed: `dense`, `grouped` or `grouped_triton`."""
        if not self.routed or self.computation != "auto":
            return self.computation if self.routed else "dense"
        if self.B.device.type != "cpu":
            # Grouped makes the host wait for a GPU in every layer; its Triton kernels, which do not, have run on none.
            return "dense"
        E, K = self.num_local_experts, min(self.top_k, self.num_local_experts)
        return "grouped" if prefer_grouped(E, K, self.r, self.expert_width, self.out_features) else "dense"

    @property
    def grouped(self) -> bool:
        """Return whether the rows of chosen experts alone are multiplied."""
        return self.form != "dense"

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of each adapter tensor that the method has: gate, shared_A, P or A, B, magnitude."""
        for module in (self.input_projection, self, self.dora):
            if module is not None:
                yield from module.named_parameters(recurse=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set B = 0, so the adapted layer starts as its base; the rest Kaiming-uniform, for MALoRA through eqs. 8-10.

        DoRA's magnitude is the norm of the base's rows.
        """
        n, E, projection = self.in_features, self.num_experts, self.input_projection
        shared_A = projection.shared_A
        if projection.gate is not None:
            width = projection.gate.shape[1]
            projection.gate.copy_(kaiming_uniform((E, width), fan_in=width, generator=generator))
        if shared_A is None or self.expert_down is None:
            down = self.expert_down if shared_A is None else shared_A
            assert down is not None
            down.copy_(kaiming_uniform(tuple(down.shape), fan_in=n, generator=generator))
        else:
            K_EDI = kaiming_uniform((E, len(shared_A), n), fan_in=n, generator=generator)
            values = shared_subspace_init(K_EDI, self.r, self.spec.beta)
            for factor, value in zip((shared_A, self.expert_down), values, strict=True):
                factor.copy_(value)
        self.B.zero_()
        if self.dora is not None:
            self.dora.magnitude.copy_(self.dora.base_squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the adapted layer: project and route x, dispatch, experts, base layer, combine."""
        if not self.adapter_enabled:
            base: Tensor = self.base_layer(x)
            return base
        inputs, tokens = self._project_and_dispatch(x)
        inputs = inputs._replace(routing=self._keep(inputs.routing))
        if tokens is None:
            # All experts are on this rank, and add to the base's output in place.
            y_TO = self._add_experts(self._base(inputs.x_TI), inputs)
        else:
            # The sums are sent back to the ranks of the tokens while the base layer computes.
            combine = tokens.start_combine(self._sum_experts(tokens.rows, tokens.gates))
            y_TO = combine.finish(self._base(inputs.x_TI))
        return y_TO.view(*x.shape[:-1], self.out_features)

    def _project_and_dispatch(self, x: Tensor) -> Prepared:
        """Project x (..., I), for all linears that read it, and send its tokens to experts on other ranks, if any."""
        if self.shared_input is not None:
            return self.shared_input.take(self.input_projection, x)
        through_A = self.down_name == "A" and not self.grouped and self.dora is None
        A = self.expert_down if through_A else None
        return self.input_projection.project(x, A, self.weight_copies), None

    def _base(self, x_TI: Tensor) -> Tensor:
        """Compute the base layer; the result may be added to in place."""
        base_TO: Tensor = self.base_layer(x_TI)
        if self.base_layer._backward_hooks or self.base_layer._backward_pre_hooks:
            # Such hooks hand out a view, which must not be added to in place.
            return base_TO.clone()
        return base_TO

    def _keep(self, routing: Routing | None) -> Routing | None:
        """Keep the routing of a forward for the balance loss, and return it; a recomputation takes up its gradient."""
        if not torch.compiler.is_compiling() and is_recomputing():
            # Not kept: it would keep a block's graph alive until the next forward.
            deferred = self.deferred_balance
            return routing if deferred is None or routing is None else deferred.attach(routing)
        if not torch.compiler.is_compiling() and self.balanced and self.training:
            note_missing_graph(self.deferred_balance)
        self.routing = routing
        if isinstance(self.routings, list) and routing is not None:
            self.routings.append(routing)
        elif self.routings:
            # Of an earlier forward.
            self.routings = None
        return routing

    def _add_experts(self, base_TO: Tensor, inputs: ProjectedInput) -> Tensor:
        """Add the weighted experts of this module to the base's output, in place but for DoRA."""
        h, routing, down = inputs.h, inputs.routing, self.expert_down
        if self.dora is not None:
            assert down is not None
            same = self.input_projection.dropout == 0 or not self.training
            A, B = down.to(h.dtype), self.B.to(h.dtype)
            return self.dora(self.base_layer, base_TO, h, A, B, self.scaling, same)  # type: ignore[no-any-return]
        if self.grouped:
            assert routing is not None
            return self._grouped(base_TO, h, routing)
        gates_TE = None if routing is None else routing.gates_TE
        down = None if inputs.after_A else down
        return dense_experts(base_TO, h, down, self.B, gates_TE, self.scaling, self.weight_copies)

    def _sum_experts(self, h_ND: Tensor, gates_NE: Tensor) -> Tensor:
        """Sum this module's experts, (N, O), for rows that come with one gate per local expert."""
        if not self.grouped:
            return dense_experts(None, h_ND, self.expert_down, self.B, gates_NE, self.scaling, self.weight_copies)
        top_k = min(self.top_k, self.num_local_experts)
        # A row may have fewer experts here than top_k: its further ones have gate 0 and add nothing.
        ids_NK = largest(gates_NE.detach(), top_k)
        return self._grouped(None, h_ND, Routing(gates_NE, ids_NK, gates_NE))

    def _grouped(self, base_TO: Tensor | None, h: Tensor, routing: Routing) -> Tensor:
        factors = self.expert_down, self.B, routing, self.scaling, self.weight_copies
        # The kernels have no fp64.
        triton = self.form == "grouped_triton" and h.dtype != torch.float64
        return grouped_experts(base_TO, h, *factors, triton=triton)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, r={self.r}, shared_r={self.shared_r}, "
            f"scaling={self.scaling}, form={self.form}"
        )


def require_triton(device: torch.device, name: str = "computation") -> None:
    """Raise ConfigError where the Triton kernels cannot run on `device`, with what is missing.

    Args:
        device: where the layer computes.
        name: what people who asked for the kernels call the argument or setting.
    """
    missing = missing_for_triton(device)
    if missing is not None:
        raise ConfigError(f"{name}=grouped_triton needs {missing}; choose {name}=auto")


def _measure_again(layer: MixtureLinear, _: object) -> None:
    """Measure DoRA's norms anew: they are those of the base, which a state dict may have replaced."""
    assert layer.dora is not None
    if not layer.B.is_meta and all(parameter.numel() for parameter in layer.base_layer.parameters()):
        layer.dora.measure(layer.base_layer)
