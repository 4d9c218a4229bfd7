"""What an adapted linear computes from its input before the experts: shared down-projection, dropout and routing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.ops.dropout import keyed_dropout
from malora_dist.ops.input_projection import autocast, inner_router_logits, project
from malora_dist.ops.products import WeightCopies
from malora_dist.ops.routing import Routing, choose, choose_each
from malora_dist.ops.task_gradients import TaskGradients


class ProjectedInput(NamedTuple):
    """A layer's input as base and experts read it.

    x_TI: the input as the base layer must read it (`ops.input_projection`).
    h: what experts read: S_A drop(x) (T, D), or drop(x) (T, I) of methods without S_A.
    routing: the experts of each token; None without a router.
    after_A: h (T, E*R) has passed the experts' own A already.
    """

    x_TI: Tensor
    h: Tensor
    routing: Routing | None
    after_A: bool = False


class InputProjection(nn.Module):
    """Router and shared down-projection S_A of one linear (MALoRA eqs. 4 and 7).

    The router reads x before dropout, or with `router_input` h what the experts read, h = S_A drop(x). A method without
    S_A (MoLoRA, LoRA) has no h here, one without a router (LoRA, DoRA) no routing. A module of its own, because ZeRO-3
    gathers weights module by module: linears that share their input can then be projected together, without gathering
    what their experts hold.

    token_keys: which tokens the next forward sees, so that dropout masks do not depend on ranks (`ops.dropout`). None
    outside our training loop: then keys are drawn, as nn.Dropout would draw a mask.
    keeps_log_sums: whether routings hold what the z-loss needs.
    task_gradients: what also gets the gradients of S_A by task.
    """

    keeps_log_sums = False
    task_gradients: TaskGradients | None = None
    weight_copies: WeightCopies | None = None
    gate: nn.Parameter | None
    shared_A: nn.Parameter | None

    def __init__(self, in_features: int, spec: MixtureSpec, *, dropout: float = 0.0, input_salt: int = 0) -> None:
        super().__init__()
        self.in_features, self.top_k, self.normalize_gates = in_features, spec.top_k, spec.normalize_gates
        self.reads_h, self.narrow = spec.router_input == "h", spec.router_dtype == "input"
        self.dropout, self.input_salt = dropout, input_salt
        self.token_keys: Tensor | None = None
        gate = shared_A = None
        if spec.structure.routed:
            width = spec.shared_r if self.reads_h and spec.shared_r is not None else in_features
            gate = nn.Parameter(torch.empty(spec.num_experts, width, dtype=torch.float32))
        if spec.shared_r is not None:
            shared_A = nn.Parameter(torch.empty(spec.shared_r, in_features, dtype=torch.float32))
        self.register_parameter("gate", gate)
        self.register_parameter("shared_A", shared_A)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, or a pickle: everything but what belongs to one forward."""
        return self.__dict__ | {"token_keys": None, "weight_copies": None}

    def project(self, x: Tensor, A_ERI: Tensor | None = None, A_copies: WeightCopies | None = None) -> ProjectedInput:
        """Project the input of one linear.

        Args:
            x: (..., I).
            A_ERI: the experts' own A, where all of them are summed here and the method has no S_A: h is then A drop(x).
            A_copies: where the copy of A for products is kept.
        """
        x_TI, keys_T = self.rows_and_keys(x)
        base_TI, h, routing = self(x_TI, keys_T)
        if h is None and A_ERI is not None:
            base_TI, h, _ = project(x_TI, [A_ERI], [], keys_T, self.input_salt, self.dropout, A_copies)
            return ProjectedInput(base_TI, h, routing, after_A=True)
        if h is None:
            h = x_TI if keys_T is None else keyed_dropout(x_TI, keys_T, self.input_salt, self.dropout)
        return ProjectedInput(base_TI, h, routing)

    def rows_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x as rows (T, I) in the dtype of products, and the keys (T,) of their dropout, None for none."""
        x_TI = autocast(x).reshape(-1, self.in_features)
        if self.dropout == 0 or not self.training:
            return x_TI, None
        if self.token_keys is None:
            return x_TI, torch.randint(2**31 - 1, x_TI.shape[:1], dtype=torch.int32, device=x_TI.device)
        return x_TI, self.token_keys

    def forward(self, x_TI: Tensor, keys_T: Tensor | None = None) -> tuple[Tensor, Tensor | None, Routing | None]:
        """Return x as the base layer must read it, h or None, and the routing or None. See `project`."""
        downs = [] if self.shared_A is None else [self.shared_A]
        gates = [] if self.gate is None else [self.gate]
        if not downs and not gates:
            return x_TI, None, None
        outer = [] if self.reads_h else gates
        dropout = keys_T, self.input_salt, self.dropout
        others = self.weight_copies, self.narrow, self.task_gradients
        x_TI, h_TD, logits_TE = project(x_TI, downs, outer, *dropout, *others)
        if self.reads_h:
            logits_TE = inner_router_logits(h_TD, gates, self.narrow)[0]
        routing = choose(logits_TE, self.top_k, self.normalize_gates) if gates else None
        if self.keeps_log_sums and routing is not None:
            routing = routing._replace(log_sum_T=logits_TE.logsumexp(dim=-1))
        return x_TI, h_TD if downs else None, routing

    def extra_repr(self) -> str:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        return f"{shapes}, top_k={self.top_k}, dropout={self.dropout}"


class FusedProjection(nn.Module):
    """The input projections of L linears that read one tensor: one product for all S_A, one for all routers.

    It holds the very parameters of the projections, which keep their names: files know nothing of it. A module of its
    own, because ZeRO-3 gathers weights module by module.
    """

    keeps_log_sums = False
    task_gradients: TaskGradients | None = None
    weight_copies: WeightCopies | None = None

    def __init__(self, projections: Sequence[InputProjection]) -> None:
        super().__init__()
        first = projections[0]
        for number, projection in enumerate(projections):
            assert (projection.dropout, projection.input_salt) == (first.dropout, first.input_salt)
            self.register_parameter(f"shared_A_{number}", projection.shared_A)
            self.register_parameter(f"gate_{number}", projection.gate)
        self.num_linears, self.top_k, self.normalize_gates = len(projections), first.top_k, first.normalize_gates
        self.reads_h, self.narrow = first.reads_h, first.narrow
        self.dropout, self.input_salt = first.dropout, first.input_salt

    def downs(self) -> list[nn.Parameter]:
        """Return the S_A of the linears, in the order of their rows in the product."""
        return [self.get_parameter(f"shared_A_{n}") for n in range(self.num_linears)]

    def forward(self, x_TI: Tensor, keys_T: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Routing]]:
        """Return x (T, I) as the base layers must read it, and h (T, D) and routing of each linear."""
        L = self.num_linears
        downs, gates = self.downs(), [self.get_parameter(f"gate_{n}") for n in range(L)]
        outer = [] if self.reads_h else gates
        dropout = keys_T, self.input_salt, self.dropout
        others = self.weight_copies, self.narrow, self.task_gradients
        x_TI, h_TW, logits_TN = project(x_TI, downs, outer, *dropout, *others)
        if self.reads_h:
            logits_LTE = inner_router_logits(h_TW, gates, self.narrow)
        else:
            logits_LTE = logits_TN.unflatten(1, (L, -1)).transpose(0, 1)
        routings = choose_each(logits_LTE, self.top_k, self.normalize_gates, self.keeps_log_sums)
        return x_TI, list(h_TW.chunk(L, dim=1)), routings
