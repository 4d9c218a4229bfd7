"""The adapted linear: a frozen base layer plus a mixture of low-rank experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.functional.adapter import dense_experts, grouped_experts, prefer_grouped
from malora_dist.functional.dropout import keyed_dropout
from malora_dist.functional.init import kaiming_uniform, shared_subspace_init
from malora_dist.functional.routing import Routing, route


class MixtureLinear(nn.Module):
    """y = base(x) + s * sum_{t in top-k} g_t B_t C_t h, the layer of LoRA, MoLoRA and MALoRA (eqs. 1, 5, 7).

    MALoRA (`shared_r` given): h = S_A drop(x), C_t = P_t. MoLoRA: h = drop(x), C_t = A_t. LoRA: one expert, no router.
    All adapter parameters are fp32 and belong to this module, so that one ZeRO-3 gather serves them; products run in
    the dtype of x. The router reads x before dropout. `routing` keeps the last forward's decision for the balance loss.

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
        self.scaling, self.beta, self.dropout = scaling, beta, dropout
        self.normalize_gates, self.input_salt = normalize_gates, input_salt
        entering = in_features if shared_r is None else shared_r
        self.grouped = routed and (
            computation == "grouped"
            or (computation == "auto" and prefer_grouped(num_experts, top_k, r, entering, out_features))
        )
        self.adapter_enabled = True
        self.routing = None
        self.token_keys: Tensor | None = None
        if routed:
            self.gate = nn.Parameter(torch.empty(num_experts, in_features))
        else:
            self.register_parameter("gate", None)
        if shared_r is None:
            self.A = nn.Parameter(torch.empty(num_experts, r, in_features))
        else:
            self.shared_A = nn.Parameter(torch.empty(shared_r, in_features))
            self.P = nn.Parameter(torch.empty(num_experts, r, shared_r))
        self.B = nn.Parameter(torch.empty(num_experts, out_features, r))
        if not self.B.is_meta:
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """B = 0, so the adapted layer starts as its base; the rest Kaiming-uniform, for MALoRA through eqs. 8-10."""
        n, E = self.in_features, self.num_experts
        if self.gate is not None:
            self.gate.copy_(kaiming_uniform((E, n), fan_in=n, generator=generator))
        if self.shared_r is None:
            self.A.copy_(kaiming_uniform((E, self.r, n), fan_in=n, generator=generator))
        else:
            K_EDI = kaiming_uniform((E, self.shared_r, n), fan_in=n, generator=generator)
            shared_A, P = shared_subspace_init(K_EDI, self.r, self.beta)
            self.shared_A.copy_(shared_A)
            self.P.copy_(P)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base_layer(x)
        if not self.adapter_enabled:
            return base
        y_TO = self.experts(base.reshape(-1, self.out_features), x.reshape(-1, self.in_features))
        return y_TO.view(base.shape)

    def experts(self, base_TO: Tensor, x_TI: Tensor) -> Tensor:
        """The base output with the weighted experts added."""
        self.routing = None if self.gate is None else route(x_TI, self.gate, self.top_k, self.normalize_gates)
        h = self._drop(x_TI)
        if self.shared_r is None:
            core = self.A
        else:
            h, core = F.linear(h, self.shared_A.to(x_TI.dtype)), self.P
        form = grouped_experts if self.grouped else dense_experts
        return form(base_TO, h, core.to(x_TI.dtype), self.B.to(x_TI.dtype), self.routing, self.scaling)

    def _drop(self, x_TI: Tensor) -> Tensor:
        if self.dropout == 0 or not self.training:
            return x_TI
        keys_T = self.token_keys
        if keys_T is None:
            # Outside our training loop nobody has named the samples: draw keys as nn.Dropout would draw a mask.
            keys_T = torch.randint(2**31 - 1, x_TI.shape[:1], dtype=torch.int32, device=x_TI.device)
        return keyed_dropout(x_TI, keys_T, self.input_salt, self.dropout)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, r={self.r}, shared_r={self.shared_r}, "
            f"scaling={self.scaling}, dropout={self.dropout}, grouped={self.grouped}"
        )
