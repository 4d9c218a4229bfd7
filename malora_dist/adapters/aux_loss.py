"""The balance loss of a forward of an adapted model, and how it gets into the loss that the model returns.

It is that of each forward alone, as most trainers of mixtures have it: E * sum_e f_e P_e of each router over the tokens
of the forward, the mean over routers (`ops.balance`). Padding does not count.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.inject import mixture_layers
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.ops.balance import expert_statistics, load_balancing_loss

IGNORED = -100


def aux_loss(model: nn.Module, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the load-balancing loss of the model's last forward.

    Add it to a loss of your own, times a coefficient. A model of `get_malora_model` has it in `outputs.loss` already.

    Args:
        model: a model with adapters.
        attention_mask: (B, S) of the forward's B x S tokens; where it is 0, a token does not count.

    Returns:
        A scalar, 1 at perfect balance; 0 if no layer has anything to balance.
    """
    layers = [layer for _, layer in mixture_layers(model) if layer.balanced and layer.routing is not None]
    if not layers:
        return torch.zeros((), device=next(model.parameters()).device)
    terms: list[_Term] = []
    groups = [_losses(group, attention_mask, len(layers), terms) for group in _alike(layers)]
    device = groups[-1].device
    loss = torch.cat([losses_L.to(device) for losses_L in groups]).sum() / len(layers)
    if not terms:
        return loss
    return _HandOver.apply(loss, torch.zeros((), device=device, requires_grad=True), terms)  # type: ignore[no-any-return]


# A layer that will be run again in backward, the gradient of its tokens' probabilities (E,), and the tokens that count.
_Term = tuple[MixtureLinear, Tensor, Tensor | None]


def _alike(layers: Sequence[MixtureLinear]) -> list[list[MixtureLinear]]:
    """Return the layers by device and number of rows: those of one group have seen the same tokens."""
    groups: dict[object, list[MixtureLinear]] = {}
    for layer in layers:
        assert layer.routing is not None
        groups.setdefault((layer.routing.probs_TE.device, layer.routing.expert_ids_TK.shape), []).append(layer)
    return list(groups.values())


def _losses(
    layers: Sequence[MixtureLinear], attention_mask: Tensor | None, num_layers: int, terms: list[_Term]
) -> Tensor:
    """Return the loss of each router (L,); note the gradients of those that ran without a graph."""
    routings = [layer.routing for layer in layers if layer.routing is not None]
    T, top_k = routings[0].expert_ids_TK.shape
    mask_T = _token_mask(attention_mask, T, routings[0].probs_TE.device)
    counts_GLE, prob_sum_LE = expert_statistics(routings, mask_T=mask_T)
    counts_LE = counts_GLE[0]
    tokens = (counts_LE[0].sum() / top_k).clamp(min=1)
    for layer, counts_E in zip(layers, counts_LE, strict=True):
        if layer.deferred_balance is not None and layer.deferred_balance.waiting:
            gradient_E = len(counts_E) * counts_E / (top_k * tokens) / tokens / num_layers
            terms.append((layer, gradient_E, mask_T))
    return load_balancing_loss(counts_LE, prob_sum_LE, tokens, top_k)


def _token_mask(attention_mask: Tensor | None, T: int, device: torch.device) -> Tensor | None:
    """Return which of T rows are tokens that count; None where the mask is not one of these rows."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.numel() != T:
        return None
    return attention_mask.reshape(-1).to(device) != 0


class _HandOver(torch.autograd.Function):
    """The loss as it is; at the beginning of backward the layers get the gradients they will need."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, _: Tensor, terms: list[_Term]) -> Tensor:
        ctx.terms = terms
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for layer, gradient_E, mask_T in ctx.terms:
            layer.deferred_balance.gradient = grads[0].to(gradient_E.device) * gradient_E, mask_T
        return grads[0], torch.zeros_like(grads[0]), None


def forget_routing(model: nn.Module) -> None:
    """Let no layer keep what an earlier forward said; layers that the next one does not call then do not count."""
    for _, layer in mixture_layers(model):
        layer.routing = None
        if layer.deferred_balance is not None:
            layer.deferred_balance.reset()


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
