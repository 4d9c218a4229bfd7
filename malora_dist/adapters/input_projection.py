"""What an adapted linear does to its input before any expert sees it."""

import torch
from torch import Tensor, nn

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.ops.input_projection import project
from malora_dist.ops.products import WeightCopies
from malora_dist.ops.routing import Routing, choose


class InputProjection(nn.Module):
    """Router and shared down-projection S_A: x (T, I) -> h (T, D) and who gets it (MALoRA eqs. 4 and 7).

    The router reads x before dropout, h = S_A drop(x). A method without S_A (MoLoRA, LoRA) has no h, one without a
    router (LoRA, DoRA) no routing. A module of its own, because ZeRO-3 gathers weights module by module: linears that
    share their input can then be asked for h together, without gathering what their experts hold.
    """

    weight_copies: WeightCopies | None = None
    gate: nn.Parameter | None
    shared_A: nn.Parameter | None

    def __init__(self, in_features: int, spec: MixtureSpec, *, dropout: float = 0.0, input_salt: int = 0) -> None:
        super().__init__()
        self.top_k, self.normalize_gates = spec.top_k, spec.normalize_gates
        self.dropout, self.input_salt = dropout, input_salt
        gate = None
        if spec.structure.routed:
            gate = nn.Parameter(torch.empty(spec.num_experts, in_features, dtype=torch.float32))
        self.register_parameter("gate", gate)
        shared_A = None
        if spec.shared_r is not None:
            shared_A = nn.Parameter(torch.empty(spec.shared_r, in_features, dtype=torch.float32))
        self.register_parameter("shared_A", shared_A)

    def forward(self, x_TI: Tensor, keys_T: Tensor | None = None) -> tuple[Tensor, Tensor | None, Routing | None]:
        """x as the base layer must read it (`ops.input_projection`), h, and the routing. `keys_T`: `dropout_keys`."""
        downs = [] if self.shared_A is None else [self.shared_A]
        gates = [] if self.gate is None else [self.gate]
        if not downs and not gates:
            return x_TI, None, None
        x_TI, h_TD, logits_TE = project(x_TI, downs, gates, keys_T, self.input_salt, self.dropout, self.weight_copies)
        routing = choose(logits_TE, self.top_k, self.normalize_gates) if gates else None
        return x_TI, h_TD if downs else None, routing

    def dropout_keys(self, x_TI: Tensor, token_keys_T: Tensor | None) -> Tensor | None:
        """`token_keys_T`, which say which tokens these are so that masks do not depend on ranks; None to drop nothing.

        Outside our training loop nobody has named the samples: then keys are drawn, as nn.Dropout would draw a mask.
        """
        if self.dropout == 0 or not self.training:
            return None
        if token_keys_T is None:
            return torch.randint(2**31 - 1, x_TI.shape[:1], dtype=torch.int32, device=x_TI.device)
        return token_keys_T

    def extra_repr(self) -> str:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        return f"{shapes}, top_k={self.top_k}, dropout={self.dropout}"
