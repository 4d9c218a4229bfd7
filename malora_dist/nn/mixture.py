"""The adapted linear: a frozen base layer plus a mixture of low-rank experts."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from malora_dist.functional.adapter import dense_experts, grouped_experts, prefer_grouped
from malora_dist.functional.init import kaiming_uniform, shared_subspace_init
from malora_dist.functional.routing import Routing, dense_gates
from malora_dist.nn.dora import Magnitude
from malora_dist.nn.entrance import Entrance

AddExperts = Callable[[Tensor], Tensor]


class Dispatcher(Protocol):
    """How the tokens of a layer reach their experts."""

    def start(self, layer: "MixtureLinear", x: Tensor) -> AddExperts:
        """Begin with the layer's input (..., I); the result turns the base output (T, O) into the layer's output."""


class MixtureLinear(nn.Module):
    """y = base(x) + s * sum_{t in top-k} g_t B_t C_t h, the layer of all methods (eqs. 1, 5, 7).

    MALoRA (`shared_r` and `core`): h = S_A drop(x), C_t = P_t. HydraLoRA (`shared_r` alone): h = S_A drop(x), no C_t,
    all experts. MoLoRA: h = drop(x), C_t = A_t. LoRA: one expert, no router; DoRA (`magnitude`): LoRA, rescaled.
    The experts' stacked factors belong to this module, router and S_A to its `entrance`, DoRA's norms to `dora`. All
    are fp32; products run in the dtype of x. `routing` keeps the last forward's decision; `balanced` says whether it
    belongs in the balance loss.

    Without a `dispatcher` all experts are here. With one (`parallel.apply`), this module holds `num_local_experts` of
    them and the dispatcher brings the tokens.

    Shapes: x (..., I) -> (..., O).
    """

    routing: Routing | None

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        in_features: int,
        out_features: int,
        num_experts: int,
        top_k: int,
        r: int,
        shared_r: int | None,
        routed: bool,
        scaling: float,
        core: bool = True,
        balanced: bool = True,
        magnitude: bool = False,
        beta: float = 1.0,
        dropout: float = 0.0,
        normalize_gates: bool = False,
        computation: str = "auto",
        input_salt: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.top_k, self.r, self.shared_r = num_experts, top_k, r, shared_r
        self.routed, self.scaling, self.beta, self.computation = routed, scaling, beta, computation
        self.entrance = Entrance(
            in_features,
            num_experts,
            top_k=top_k,
            shared_r=shared_r,
            routed=routed,
            normalize_gates=normalize_gates,
            dropout=dropout,
            input_salt=input_salt,
        )
        self.balanced = routed and balanced
        self.dora = Magnitude(out_features) if magnitude else None
        self.core_name = "A" if shared_r is None else "P" if core else None
        width = in_features if shared_r is None else shared_r
        B = nn.Parameter(torch.empty(num_experts, out_features, r))
        self.set_experts(None if self.core_name is None else nn.Parameter(torch.empty(num_experts, r, width)), B)
        self.adapter_enabled = True
        self.dispatcher: Dispatcher | None = None
        self.routing = None
        self.token_keys: Tensor | None = None
        if not self.B.is_meta:
            self.reset_parameters(generator)

    @property
    def core(self) -> nn.Parameter | None:
        """What leads into the experts' ranks: P (E, r, D), A (E, r, I) without S_A, or nothing."""
        return None if self.core_name is None else self.get_parameter(self.core_name)

    def set_experts(self, core: nn.Parameter | None, B: nn.Parameter) -> None:
        """Hold these experts, all or a slice of them, and choose the cheaper form for their number."""
        if self.core_name is not None:
            setattr(self, self.core_name, core)
        self.B = B
        self.num_local_experts = len(B)
        in_width = self.r if core is None else core.shape[2]
        top_k = min(self.top_k, self.num_local_experts)
        self.grouped = self.routed and (
            self.computation == "grouped"
            or (
                self.computation == "auto"
                and prefer_grouped(self.num_local_experts, top_k, self.r, in_width, self.out_features)
            )
        )

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of every adapter tensor: gate, shared_A, P or A, B, magnitude; those the method has."""
        for module in (self.entrance, self, self.dora):
            if module is not None:
                yield from module.named_parameters(recurse=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """B = 0, so the adapted layer starts as its base; the rest Kaiming-uniform, for MALoRA through eqs. 8-10.

        DoRA's magnitude is the norm of the base's rows, whose weight must be whole and in memory.
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
                (shared_A, self.core), shared_subspace_init(K_EDI, self.r, self.beta), strict=True
            ):
                factor.copy_(value)
        self.B.zero_()
        if self.dora is not None:
            self.dora.measure(self.base_layer)
            self.dora.magnitude.copy_(self.dora.base_squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        if not self.adapter_enabled:
            base: Tensor = self.base_layer(x)
            return base
        add_experts = self._start(x) if self.dispatcher is None else self.dispatcher.start(self, x)
        base = self.base_layer(x)
        return add_experts(base.reshape(-1, self.out_features)).view(base.shape)

    def enter(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """h (T, D or I) and the routing of the input (..., I), which `routing` keeps."""
        h, self.routing = self.entrance(x.reshape(-1, self.in_features), self.token_keys)
        return h, self.routing

    def _start(self, x: Tensor) -> AddExperts:
        h, routing = self.enter(x)
        return lambda base_TO: self.add_experts(base_TO, h, routing)

    def add_experts(self, base_TO: Tensor, h: Tensor, routing: Routing | None) -> Tensor:
        """The base output with the weighted experts of this module added."""
        core, B = self._experts(h.dtype)
        if self.dora is not None:
            assert core is not None
            same = self.entrance.dropout == 0 or not self.training
            return self.dora(self.base_layer, base_TO, h, core, B, self.scaling, same)  # type: ignore[no-any-return]
        if self.grouped:
            assert routing is not None
            return grouped_experts(base_TO, h, core, B, routing, self.scaling)
        gates_TE = None if routing is None else dense_gates(routing)
        return dense_experts(base_TO, h, core, B, gates_TE, self.scaling)

    def sum_experts(self, h_ND: Tensor, gates_NE: Tensor) -> Tensor:
        """(N, O): the sum over this module's experts for rows that come with one gate per local expert."""
        core, B = self._experts(h_ND.dtype)
        if not self.grouped:
            return dense_experts(None, h_ND, core, B, gates_NE, self.scaling)
        top_k = min(self.top_k, self.num_local_experts)
        # A row may have fewer experts here than top_k: its further ones have gate 0 and add nothing.
        ids_NK = gates_NE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        routing = Routing(gates_NE.gather(1, ids_NK), ids_NK, gates_NE)
        return grouped_experts(None, h_ND, core, B, routing, self.scaling)

    def _experts(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        core = self.core
        return None if core is None else core.to(dtype), self.B.to(dtype)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, r={self.r}, shared_r={self.shared_r}, "
            f"scaling={self.scaling}, grouped={self.grouped}"
        )
