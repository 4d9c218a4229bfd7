"""What activation checkpointing does to a forward: which pass it is, and how the balance loss gets its gradient."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora_dist.errors import TrainingError
from malora_dist.ops.balance import token_mask
from malora_dist.ops.routing import Routing

# What runs the forward of every autograd function, and how the names of those end that run layers again in backward,
# PyTorch's, DeepSpeed's and Megatron's.
APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
REENTRANT = "CheckpointFunction"


def is_recomputing() -> bool:
    """Return whether this forward runs inside a backward."""
    return torch._C._current_graph_task_id() != -1


def note_missing_graph(deferred: "DeferredBalance | None") -> None:
    """Note whether a training forward runs without a graph, as reentrant checkpointing lets it.

    What a router says there has no gradient; `deferred` will add one when the layer is run again.

    Raises:
        TrainingError: nobody will add it, or another autograd function is around the layer, such as tiled and
            reversible ones, of which it is not known whether and how often they run layers again.
    """
    names = _functions_around()
    if not names:
        return
    others = [name for name in names if not name.endswith(REENTRANT)]
    if deferred is not None and not others:
        deferred.waiting += 1
        return
    way_out = "" if others else "put the adapters on with get_malora_model, which adds it, or "
    raise TrainingError(
        "reentrant activation checkpointing (use_reentrant=True), or another autograd function around layers, runs "
        f"them without a graph ({', '.join(others or names)}), so that routers would get no gradient of the balance "
        f"loss: {way_out}choose use_reentrant=False, in transformers "
        'model.activation_checkpointing_enable({"use_reentrant": False}) or '
        'TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})'
    )


def _functions_around() -> list[str]:
    """Return the names of the autograd functions in whose forwards, which have no graph, this runs."""
    names, frame = [], None if torch.is_grad_enabled() else sys._getframe(1)
    while frame is not None:
        if frame.f_code is APPLY:
            names.append(frame.f_locals["cls"].__name__)
        frame = frame.f_back
    return names


@dataclass
class DeferredBalance:
    """The gradient of the balance loss for a layer whose forward ran without a graph.

    Of the loss E * sum_e f_e P_e the probabilities get E f_e / T, which is known when the forward of the model has
    ended. The loss hands it over at the beginning of backward, before the layer is run again; the graph of that run
    then takes it up.

    Attributes:
        waiting: how many calls of the last forward had no graph.
        gradient: of each token's probabilities (E,), and the forward's attention mask, None where all tokens count.
        calls: how many calls the gradient is for.
    """

    waiting: int = 0
    gradient: tuple[Tensor, Tensor | None] | None = None
    calls: int = 0

    def reset(self) -> None:
        """Forget the last forward."""
        self.waiting, self.gradient, self.calls = 0, None, 0

    def hand_over(self, gradient_E: Tensor, attention_mask: Tensor | None, calls: int) -> None:
        """Take the gradient that so many calls are to take up."""
        self.gradient, self.calls = (gradient_E, attention_mask), calls

    def attach(self, routing: Routing) -> Routing:
        """Return the routing of a recomputation, whose probabilities get the gradient, once for each call."""
        if self.gradient is None or not routing.probs_TE.requires_grad:
            return routing
        gradient_E, attention_mask = self.gradient
        self.calls -= 1
        if self.calls == 0:
            self.gradient = None
        mask_T = token_mask(attention_mask, len(routing.probs_TE), routing.probs_TE.device)
        return routing._replace(gates_TE=_AddGradient.apply(routing.gates_TE, routing.probs_TE, gradient_E, mask_T))


class _AddGradient(torch.autograd.Function):
    """Gates as they are; in backward the probabilities get a gradient of their own."""

    @staticmethod
    def forward(ctx: Any, gates_TE: Tensor, probs_TE: Tensor, gradient_E: Tensor, mask_T: Tensor | None) -> Tensor:
        ctx.shape, ctx.gradient_E, ctx.mask_T = probs_TE.shape, gradient_E, mask_T
        return gates_TE.view_as(gates_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TE = ctx.gradient_E.expand(ctx.shape).contiguous()
        if ctx.mask_T is not None:
            grad_TE = grad_TE * ctx.mask_T[:, None]
        return grads[0], grad_TE, None, None
