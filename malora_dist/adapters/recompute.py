"""What activation checkpointing does to a forward: which pass it is, and how the balance loss gets its gradient."""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from malora_dist.errors import TrainingError
from malora_dist.ops.routing import Routing

REENTRANT = "CheckpointFunction.forward"


def is_recomputing() -> bool:
    """Return whether this forward runs inside a backward."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Return whether this forward is one of reentrant checkpointing, which runs without a graph.

    Every such checkpointing, PyTorch's, DeepSpeed's or Megatron's, is an autograd function of this name.
    """
    frame: FrameType | None = None if torch.is_grad_enabled() else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname.endswith(REENTRANT):
            return True
        frame = frame.f_back
    return False


def refuse_reentrant() -> None:
    """Raise TrainingError: what a router says without a graph has no gradient, and nobody here will add one."""
    raise TrainingError(
        "reentrant activation checkpointing (use_reentrant=True) runs layers without a graph, so that routers "
        "would get no gradient of the balance loss: put the adapters on with get_malora_model, which adds it, or "
        'choose use_reentrant=False: model.activation_checkpointing_enable({"use_reentrant": False}), or '
        'TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})'
    )


@dataclass
class DeferredBalance:
    """The gradient of the balance loss for a layer whose forward ran without a graph.

    Of the loss E * sum_e f_e P_e the probabilities get E f_e / T, which is known when the forward of the model has
    ended. The loss hands it over at the beginning of backward, before the layer is run again; the graph of that run
    then takes it up.

    Attributes:
        waiting: whether the last forward had no graph.
        gradient: of each token's probabilities (E,), and which tokens count (T,), None for all.
    """

    waiting: bool = False
    gradient: tuple[Tensor, Tensor | None] | None = None

    def reset(self) -> None:
        """Forget the last forward."""
        self.waiting, self.gradient = False, None

    def attach(self, routing: Routing) -> Routing:
        """Return the routing of the recomputation, whose probabilities get the gradient, once."""
        if self.gradient is None or not routing.probs_TE.requires_grad:
            return routing
        gradient, self.gradient = self.gradient, None
        return routing._replace(gates_TE=_AddGradient.apply(routing.gates_TE, routing.probs_TE, *gradient))


class _AddGradient(torch.autograd.Function):
    """Gates as they are; in backward the probabilities get a gradient of their own."""

    @staticmethod
    def forward(ctx: Any, gates_TE: Tensor, probs_TE: Tensor, gradient_E: Tensor, mask_T: Tensor | None) -> Tensor:
        ctx.shape, ctx.gradient_E, ctx.mask_T = probs_TE.shape, gradient_E, mask_T
        return gates_TE.view_as(gates_TE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TE = ctx.gradient_E.expand(ctx.shape).contiguous()
        if ctx.mask_T is not None:
            grad_TE = grad_TE * ctx.mask_T[:, None]
        return grads[0], grad_TE, None, None
