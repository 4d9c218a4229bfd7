"""What activation checkpointing does to a forward: which pass it is, and how the balance loss gets its gradient."""

import sys
from dataclasses import dataclass, field
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

    A routing computed there has no gradient; `deferred` will add one when the layer is run again.

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
        'TrainingArguments(activation_checkpointing_kwargs={"use_reentrant": False})'
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
        number: how many forwards there were before the last one.
        waiting: how many calls of the last forward had no graph.
        gradients: of each token's probabilities (E,), and the attention mask that goes with it, None where all tokens
            count; one for each loss of the forward that gradients are for.
        owner: the number of that forward.
        calls: how many calls are to take them up.
    """

    number: int = 0
    waiting: int = 0
    gradients: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    owner: int = -1
    calls: int = 0

    def reset(self) -> None:
        """Forget the last forward."""
        self.number, self.waiting = self.number + 1, 0
        self._forget_gradients()

    def hand_over(self, forward: int, gradient_E: Tensor, attention_mask: Tensor | None, calls: int) -> None:
        """Take a gradient that so many calls of a forward are to take up, beside others of the same forward."""
        if self.owner != forward or self.calls != calls:
            self.gradients, self.owner, self.calls = [], forward, calls
        self.gradients.append((gradient_E, attention_mask))

    def attach(self, routing: Routing) -> Routing:
        """Return the routing of a recomputation, whose probabilities get the gradients, once for each call."""
        if not self.gradients or not routing.probs_TE.requires_grad:
            return routing
        for gradient_E, attention_mask in self.gradients:
            mask_T = token_mask(attention_mask, len(routing.probs_TE), routing.probs_TE.device)
            gates_TE = _AddGradient.apply(routing.gates_TE, routing.probs_TE, gradient_E, mask_T)
            routing = routing._replace(gates_TE=gates_TE)
        self.calls -= 1
        if self.calls == 0:
            self._forget_gradients()
        return routing

    def check_taken(self) -> None:
        """Raise TrainingError at the end of a backward in which nothing has taken the gradients up."""
        if not self.gradients:
            return
        self._forget_gradients()
        raise TrainingError(
            "the balance loss went backward, and not all the layers that it is of have been run again in that "
            "backward, so that their routers got no gradient: under reentrant activation checkpointing add "
            "aux_loss(model) to the loss that goes backward, or choose use_reentrant=False"
        )

    def _forget_gradients(self) -> None:
        self.gradients, self.owner, self.calls = [], -1, 0


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
