"""The balance loss of a forward of an adapted model, and how it gets into the loss that the model returns.

It is that of each forward alone, as most trainers of mixtures have it: E * sum_e f_e P_e of each router over the tokens
of the forward, the mean over routers (`ops.balance`). Padding does not count.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.recompute import DeferredBalance
from malora_dist.ops.balance import expert_statistics, load_balancing_loss, token_mask
from malora_dist.ops.routing import Routing

IGNORED = -100


def aux_loss(model: nn.Module, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the load-balancing loss of the model's last forward.

    Add it to a loss of your own, times a coefficient. A model of `get_malora_model` has it in `outputs.loss` already,
    and counts every call of layers that it repeats; of other models the last call of each layer counts.

    Args:
        model: a model with adapters.
        attention_mask: (B, S) of the forward's B x S tokens; where it is 0, a token does not count.

    Returns:
        A scalar, 1 at perfect balance; 0 if no layer has anything to balance.
    """
    calls = {layer: _calls(layer) for _, layer in mixture_layers(model) if layer.balanced and layer.routing is not None}
    if not calls:
        return torch.zeros((), device=next(model.parameters()).device)
    terms: list[_Term] = []
    groups = [_losses(group, attention_mask, len(calls), terms) for group in _alike(calls)]
    device = groups[-1].device
    loss = torch.cat([losses_L.to(device) for losses_L in groups]).sum() / len(calls)
    if not terms:
        return loss
    return _HandOver.apply(loss, torch.zeros((), device=device, requires_grad=True), terms, attention_mask)  # type: ignore[no-any-return]


# What waits for a layer to be run again in backward, for which forward, how often, and the gradient of its tokens'
# probabilities (E,).
_Term = tuple[DeferredBalance, int, int, Tensor]
_Calls = Mapping[MixtureLinear, Sequence[Routing]]


def _calls(layer: MixtureLinear) -> Sequence[Routing]:
    """Return the router's routing in each call of the last forward."""
    assert layer.routing is not None
    return layer.routings or [layer.routing]


def _alike(calls: _Calls) -> list[_Calls]:
    """Return the layers by device and numbers of rows: those of one group have seen the same tokens."""
    groups: dict[object, dict[MixtureLinear, Sequence[Routing]]] = {}
    for layer, routings in calls.items():
        shapes = tuple(routing.expert_ids_TK.shape for routing in routings)
        groups.setdefault((routings[0].probs_TE.device, shapes), {})[layer] = routings
    return list(groups.values())


def _losses(calls: _Calls, attention_mask: Tensor | None, num_layers: int, terms: list[_Term]) -> Tensor:
    """Return the loss of each router (L,) over all its calls; note the gradients of those that ran without a graph."""
    counts_LE = prob_sum_LE = torch.zeros(())
    for number, routings in enumerate(zip(*calls.values(), strict=True)):
        T, top_k = routings[0].expert_ids_TK.shape
        mask_T = token_mask(attention_mask, T, routings[0].probs_TE.device)
        counts_GLE, probs_LE, _ = expert_statistics(routings, mask_T=mask_T)
        counts_LE = counts_GLE[0] if number == 0 else counts_LE + counts_GLE[0]
        prob_sum_LE = probs_LE if number == 0 else prob_sum_LE + probs_LE
    tokens = (counts_LE[0].sum() / top_k).clamp(min=1)
    for layer, counts_E in zip(calls, counts_LE, strict=True):
        deferred = layer.deferred_balance
        if deferred is not None and deferred.waiting:
            gradient_E = len(counts_E) * counts_E / (top_k * tokens) / tokens / num_layers
            terms.append((deferred, deferred.number, deferred.waiting, gradient_E))
    return load_balancing_loss(counts_LE, prob_sum_LE, tokens, top_k)


class _HandOver(torch.autograd.Function):
    """The loss as it is; at the beginning of backward the layers get the gradients they will need."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, _: Tensor, terms: list[_Term], attention_mask: Tensor | None) -> Tensor:
        ctx.terms, ctx.attention_mask = terms, attention_mask
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for deferred, forward, calls, gradient_E in ctx.terms:
            scaled_E = grads[0].to(gradient_E.device) * gradient_E
            deferred.hand_over(forward, scaled_E, ctx.attention_mask, calls)
            torch.autograd.Variable._execution_engine.queue_callback(deferred.check_taken)
        return grads[0], torch.zeros_like(grads[0]), None, None


@contextmanager
def keeping_routings(model: nn.Module) -> Iterator[None]:
    """Let each layer keep the routing of every call within the block, and forget those of an earlier forward.

    Layers that the block does not call then do not count. What is called after it, such as a part of the model, is not
    added to it.
    """
    layers = [layer for _, layer in mixture_layers(model)]
    for layer in layers:
        layer.routing, layer.routings = None, []
        if layer.deferred_balance is not None:
            layer.deferred_balance.reset()
    try:
        yield
    finally:
        for layer in layers:
            layer.routings = tuple(layer.routings or ())


def argument(model: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a call of the model gives for a parameter of its forward, None if nothing."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(model.forward).parameters)
    return args[names.index(name)] if name in names[: len(args)] else None


def weight_of_batch(model: Any, kwargs: Mapping[str, Any], labels: Tensor | None) -> Tensor | float:
    """Return how much of a step's loss this forward is.

    Trainer gives `num_items_in_batch`, the number of learned tokens of all micro-batches and processes, where it wants
    sums over them: then the weights of all forwards of a step add up to 1. Else each loss is a mean of its own, which
    whoever accumulates divides.
    """
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    shift_labels = kwargs.get("shift_labels")
    if shift_labels is not None:
        labels = shift_labels
    elif labels is not None and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        labels = labels[..., 1:]
    if labels is None:
        return 1.0
    return (labels != IGNORED).sum() / torch.as_tensor(items, device=labels.device).clamp(min=1)


def with_loss(outputs: Any, added: Tensor, has_labels: bool) -> Any:
    """Return a model's outputs with a number added to their loss, if they have one."""
    if isinstance(outputs, tuple):
        return (_sum(outputs[0], added), *outputs[1:]) if has_labels else outputs
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        outputs["loss"] = _sum(outputs["loss"], added)  # type: ignore[index]
    return outputs


def _sum(loss: Tensor, added: Tensor) -> Tensor:
    return loss + added.to(loss.device, loss.dtype)
