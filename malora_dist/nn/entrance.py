"""What an adapted linear does to its input before any expert sees it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.functional.dropout import keyed_dropout
from malora_dist.functional.routing import Routing, route


class Entrance(nn.Module):
    """Router and shared down-projection S_A: x (T, I) -> h (T, D) and who gets it (MALoRA eqs. 4 and 7).

    The router reads x before dropout, h = S_A drop(x). Without `shared_r` (MoLoRA, LoRA) h is drop(x) itself, without
    `routed` (LoRA, DoRA) there is no routing. A module of its own, because ZeRO-3 gathers weights module by module:
    linears that share their input can then be asked for h together, without gathering what their experts hold.
    """

    gate: nn.Parameter | None
    shared_A: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        top_k: int,
        shared_r: int | None,
        routed: bool,
        normalize_gates: bool = False,
        dropout: float = 0.0,
        input_salt: int = 0,
    ) -> None:
        super().__init__()
        self.top_k, self.normalize_gates, self.dropout, self.input_salt = top_k, normalize_gates, dropout, input_salt
        gate = nn.Parameter(torch.empty(num_experts, in_features)) if routed else None
        self.register_parameter("gate", gate)
        shared_A = None if shared_r is None else nn.Parameter(torch.empty(shared_r, in_features))
        self.register_parameter("shared_A", shared_A)

    def forward(self, x_TI: Tensor, keys_T: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """h and the routing. `keys_T` says which tokens these are, for dropout masks that do not depend on ranks."""
        routing = None if self.gate is None else route(x_TI, self.gate, self.top_k, self.normalize_gates)
        h = self._drop(x_TI, keys_T)
        if self.shared_A is not None:
            h = F.linear(h, self.shared_A.to(x_TI.dtype))
        return h, routing

    def _drop(self, x_TI: Tensor, keys_T: Tensor | None) -> Tensor:
        if self.dropout == 0 or not self.training:
            return x_TI
        if keys_T is None:
            # Outside our training loop nobody has named the samples: draw keys as nn.Dropout would draw a mask.
            keys_T = torch.randint(2**31 - 1, x_TI.shape[:1], dtype=torch.int32, device=x_TI.device)
        return keyed_dropout(x_TI, keys_T, self.input_salt, self.dropout)

    def extra_repr(self) -> str:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        return f"{shapes}, top_k={self.top_k}, dropout={self.dropout}"
