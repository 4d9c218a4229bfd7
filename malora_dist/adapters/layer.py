"""The adapted linear: a frozen base layer plus a mixture of low-rank experts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.dora import Magnitude
from malora_dist.adapters.input_projection import Entrance
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.protocols import AddExperts, Dispatcher, Entered, EntersTogether
from malora_dist.adapters.recompute import DeferredBalance, in_reentrant_checkpoint, is_recomputing, refuse_reentrant
from malora_dist.ops.cost import prefer_grouped
from malora_dist.ops.dense import dense_experts
from malora_dist.ops.dropout import keyed_dropout
from malora_dist.ops.grouped import grouped_experts
from malora_dist.ops.init import kaiming_uniform, shared_subspace_init
from malora_dist.ops.input_projection import autocast, enter
from malora_dist.ops.routing import Routing, largest
from malora_dist.ops.triton_ready import triton_ready
from malora_dist.ops.weight_copies import WeightCopies


class MixtureLinear(nn.Module):
    """y = base(x) + s * sum_{t in top-k} g_t B_t C_t h, the layer of all methods (eqs. 1, 5, 7).

    `spec` says which. MALoRA: h = S_A drop(x), C_t = P_t. HydraLoRA: h = S_A drop(x), no C_t, all experts. MoLoRA:
    h = drop(x), C_t = A_t. LoRA: one expert, no router; DoRA: LoRA, rescaled.
    The experts' stacked factors belong to this module, router and S_A to its `entrance`, DoRA's norms to `dora`. All
    are fp32; products run in the dtype of x. `routing` keeps the last forward's decision; `balanced` says whether it
    belongs in the balance loss.

    The base's output is added to in place, and so is the gradient of its input: hooks on the base must copy what they
    keep. Without a `dispatcher` all experts are here. With one (`distributed.expert_parallel`), this module holds
    `num_local_experts` of them and the dispatcher brings the tokens.

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
        self.balanced = structure.routed and not structure.dense
        self.entrance = Entrance(in_features, spec, dropout=dropout, input_salt=input_salt)
        self.dora = Magnitude(out_features) if structure.magnitude else None
        self.core_name = "A" if spec.shared_r is None else "P" if structure.core else None
        width = in_features if spec.shared_r is None else spec.shared_r
        B = nn.Parameter(torch.empty(spec.num_experts, out_features, spec.r, dtype=torch.float32))
        down = None
        if self.core_name is not None:
            down = nn.Parameter(torch.empty(spec.num_experts, spec.r, width, dtype=torch.float32))
        self.set_experts(down, B)
        self.adapter_enabled = True
        self.dispatcher: Dispatcher | None = None
        self.siblings: EntersTogether | None = None
        self.routing = None
        self.deferred_balance: DeferredBalance | None = None
        self.token_keys: Tensor | None = None
        if not self.B.is_meta and self.dora is not None:
            self.dora.measure(base_layer)
        if not self.B.is_meta and init_weights:
            self.reset_parameters(generator)
        if self.dora is not None:
            self.register_load_state_dict_post_hook(_measure_again)

    @property
    def core(self) -> nn.Parameter | None:
        """What leads into the experts' ranks: P (E, r, D), A (E, r, I) without S_A, or nothing."""
        return None if self.core_name is None else self.get_parameter(self.core_name)

    @property
    def weight(self) -> Any:
        """The base's weight, for code that looks at it; the experts are not in it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base's bias, or None."""
        return self.base_layer.bias

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, or a pickle: everything but what belongs to the last forward."""
        deferred = None if self.deferred_balance is None else DeferredBalance()
        return self.__dict__ | {
            "routing": None,
            "token_keys": None,
            "weight_copies": None,
            "deferred_balance": deferred,
        }

    def set_experts(self, core: nn.Parameter | None, B: nn.Parameter) -> None:
        """Hold these experts, all or a slice of them."""
        if self.core_name is not None:
            setattr(self, self.core_name, core)
        self.B = B
        self.num_local_experts = len(B)
        self.expert_width = self.r if core is None else core.shape[2]

    @property
    def form(self) -> str:
        """Say how the experts here are summed: `dense`, `grouped` or `grouped_triton`."""
        device = self.B.device
        if not self.routed or self.computation != "auto":
            return self.computation if self.routed else "dense"
        E, K = self.num_local_experts, min(self.top_k, self.num_local_experts)
        if not prefer_grouped(E, K, self.r, self.expert_width, self.out_features, device.type):
            return "dense"
        # On a GPU the plain grouped form would make the host wait for the counts of every layer.
        return "grouped" if device.type == "cpu" else "grouped_triton" if triton_ready(device) else "dense"

    @property
    def grouped(self) -> bool:
        """Return whether the rows of chosen experts alone are multiplied."""
        return self.form != "dense"

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of every adapter tensor: gate, shared_A, P or A, B, magnitude; those the method has."""
        for module in (self.entrance, self, self.dora):
            if module is not None:
                yield from module.named_parameters(recurse=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """B = 0, so the adapted layer starts as its base; the rest Kaiming-uniform, for MALoRA through eqs. 8-10.

        DoRA's magnitude is the norm of the base's rows.
        """
        n, E, shared_A = self.in_features, self.num_experts, self.entrance.shared_A
        if self.entrance.gate is not None:
            self.entrance.gate.copy_(kaiming_uniform((E, n), fan_in=n, generator=generator))
        if shared_A is None or self.core is None:
            down = self.core if shared_A is None else shared_A
            assert down is not None
            down.copy_(kaiming_uniform(tuple(down.shape), fan_in=n, generator=generator))
        else:
            K_EDI = kaiming_uniform((E, len(shared_A), n), fan_in=n, generator=generator)
            for factor, value in zip(
                (shared_A, self.core), shared_subspace_init(K_EDI, self.r, self.spec.beta), strict=True
            ):
                factor.copy_(value)
        self.B.zero_()
        if self.dora is not None:
            self.dora.magnitude.copy_(self.dora.base_squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        if not self.adapter_enabled:
            base: Tensor = self.base_layer(x)
            return base
        x_TI, add_experts = self._start(x) if self.dispatcher is None else self.dispatcher.start(self, x)
        base_TO = self.base_layer(x_TI)
        if self.base_layer._backward_hooks or self.base_layer._backward_pre_hooks:
            # Such hooks hand out a view, which must not be added to in place.
            base_TO = base_TO.clone()
        return add_experts(base_TO).view(*x.shape[:-1], self.out_features)

    def enter(self, x: Tensor, through_A: bool = False) -> Entered:
        """What the layer makes of its input (..., I) before the experts; `routing` keeps the routing."""
        if self.siblings is not None:
            entered = self.siblings.enter(self, x)
            return entered._replace(routing=self._keep(entered.routing))
        x_TI = autocast(x).reshape(-1, self.in_features)
        keys_T = self.entrance.dropout_keys(x_TI, self.token_keys)
        base_TI, h, routing = self.entrance(x_TI, keys_T)
        routing = self._keep(routing)
        salt, p = self.entrance.input_salt, self.entrance.dropout
        if h is not None:
            return Entered(base_TI, h, routing)
        if through_A:
            base_TI, h, _ = enter(x_TI, [self.get_parameter("A")], [], keys_T, salt, p, self.weight_copies)
            return Entered(base_TI, h, routing, through_A)
        return Entered(base_TI, x_TI if keys_T is None else keyed_dropout(x_TI, keys_T, salt, p), routing)

    def _keep(self, routing: Routing | None) -> Routing | None:
        """Note the routing of a forward, and return it; that of a recomputation takes up its deferred gradient."""
        if not torch.compiler.is_compiling() and is_recomputing():
            # Not noted: it would keep a block's graph alive until the next forward.
            deferred = self.deferred_balance
            return routing if deferred is None or routing is None else deferred.attach(routing)
        if not torch.compiler.is_compiling() and self.balanced and self.training and in_reentrant_checkpoint():
            if self.deferred_balance is None:
                refuse_reentrant()
            else:
                self.deferred_balance.waiting = True
        self.routing = routing
        return routing

    def _start(self, x: Tensor) -> tuple[Tensor, AddExperts]:
        entered = self.enter(x, through_A=self.core_name == "A" and not self.grouped and self.dora is None)
        return entered.x_TI, lambda base_TO: self._add_experts(base_TO, entered)

    def _add_experts(self, base_TO: Tensor, entered: Entered) -> Tensor:
        """The base output with the weighted experts of this module added, in place but for DoRA."""
        _, h, routing, through_A = entered
        if self.dora is not None:
            assert self.core is not None
            same = self.entrance.dropout == 0 or not self.training
            A, B = self.core.to(h.dtype), self.B.to(h.dtype)
            return self.dora(self.base_layer, base_TO, h, A, B, self.scaling, same)  # type: ignore[no-any-return]
        if self.grouped:
            assert routing is not None
            return self._grouped(base_TO, h, routing)
        gates_TE = None if routing is None else routing.gates_TE
        core = None if through_A else self.core
        return dense_experts(base_TO, h, core, self.B, gates_TE, self.scaling, self.weight_copies)

    def _grouped(self, base_TO: Tensor | None, h: Tensor, routing: Routing) -> Tensor:
        factors = self.core, self.B, routing, self.scaling, self.weight_copies
        # The kernels have no fp64.
        triton = self.form == "grouped_triton" and h.dtype != torch.float64
        return grouped_experts(base_TO, h, *factors, triton=triton)

    def sum_experts(self, h_ND: Tensor, gates_NE: Tensor) -> Tensor:
        """(N, O): the sum over this module's experts for rows that come with one gate per local expert."""
        if not self.grouped:
            return dense_experts(None, h_ND, self.core, self.B, gates_NE, self.scaling, self.weight_copies)
        top_k = min(self.top_k, self.num_local_experts)
        # A row may have fewer experts here than top_k: its further ones have gate 0 and add nothing.
        ids_NK = largest(gates_NE.detach(), top_k)
        return self._grouped(None, h_ND, Routing(gates_NE, ids_NK, gates_NE))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, r={self.r}, shared_r={self.shared_r}, "
            f"scaling={self.scaling}, form={self.form}"
        )


def _measure_again(layer: MixtureLinear, _: object) -> None:
    """DoRA's norms are those of the base, which a state dict may have replaced."""
    assert layer.dora is not None
    if not layer.B.is_meta and all(parameter.numel() for parameter in layer.base_layer.parameters()):
        layer.dora.measure(layer.base_layer)
