"""The naive loop that training on many processes is compared with: no DeepSpeed, no packing, no ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.evaluation.packed_forward import set_token_keys
from tests.reference import (
    adamw_reference_step,
    balance_reference,
    clip_reference,
    coefficient_reference,
    conflict_reference,
    loss_reference,
    z_loss_reference,
)
from tests.training.workers import (
    COEFFICIENT,
    EPSILON,
    LEARNING_RATE,
    LENGTHS,
    MAX_NORM,
    SEED,
    STEPS,
    build_model,
    step_samples,
)

# Of one layer: the probabilities (T, E) and the chosen experts (T, K) of all tokens.
Routed = tuple[Tensor, Tensor]


def reference_run(
    folder: str, case: dict[str, Any], optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
) -> dict[str, Any]:
    """The same five steps in one process without DeepSpeed, packing or ranks: one sample a forward, naive sums.

    `optimizer` makes what updates the parameters; None is a naive AdamW.
    """
    model = build_model(folder, case, None, {}).train()
    names = [name for name, parameter in adapter_parameters(model) if parameter.requires_grad]
    parameters = [parameter for _, parameter in adapter_parameters(model) if parameter.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    stepping = None if optimizer is None else optimizer(parameters)
    losses, aux_losses, grad_norms, state = [], [], [], {}
    initial = {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}
    earlier: list[Tensor] = []
    for step in range(1, STEPS + 1):
        samples = step_samples(step, case.get("lengths", LENGTHS))
        ce, routed, logits = _forward(model, samples, step)
        tasks = [[[[sample.task_id for sample in samples]]]]
        loss = loss_reference([[[ce]]], case.get("normalization", "token"), tasks)[0]
        objective = _objective(case, step, loss, _balance(routed, earlier), logits)
        gradients = torch.autograd.grad(objective, parameters, retain_graph="task_conflict" in case)
        earlier_before, earlier = earlier, [ids_TK for _, ids_TK in routed]
        state |= {f"gradient.{step}.{name}": g for name, g in zip(names, gradients, strict=True)}
        if case.get("task_conflict") == "project":
            summed, named = gradients, dict(zip(names, parameters, strict=True))
            gradients = _projected(summed, named, ce, partial(_balance, routed, earlier_before), samples)
            # In the first step B is 0, and S_A has no gradient.
            assert step == 1 or any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(summed, gradients, strict=True))
        clipped, norm = clip_reference(gradients, MAX_NORM)
        losses.append(float(loss.detach()))
        aux_losses.append(float(_balance(routed).detach()))
        grad_norms.append(float(norm))
        if stepping is not None:
            for parameter, gradient in zip(parameters, clipped, strict=True):
                parameter.grad = gradient
            stepping.step()
            continue
        with torch.no_grad():
            for i, (name, parameter, gradient) in enumerate(zip(names, parameters, clipped, strict=True)):
                ratio = case.get("lr_ratios", {}).get(name.rpartition(".")[2], 1.0)
                new, *moments_i = adamw_reference_step(
                    parameter,
                    gradient,
                    *moments[i],
                    step,
                    learning_rate=ratio * LEARNING_RATE,
                    epsilon=EPSILON,
                    weight_decay=0.01,
                )
                parameter.copy_(new)
                moments[i] = (moments_i[0], moments_i[1])
    for name, parameter, (first, second) in zip(names, parameters, moments, strict=True):
        state |= {name: parameter.detach(), f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
    numbers = {"losses": losses, "aux_losses": aux_losses, "grad_norms": grad_norms}
    return numbers | {"initial": initial, "state": state}


def _projected(
    gradients: Sequence[Tensor],
    parameters: dict[str, nn.Parameter],
    ce: Sequence[Tensor],
    balance_of: Callable[[Tensor], Tensor],
    samples: Sequence[Sample],
) -> list[Tensor]:
    """The gradients with those of S_A without conflicts: each task's is that of its tokens' part of what is minimised.

    `balance_of` is the part of the balance loss of the tokens that a mask (T,) names; the loss is a mean over targets.
    """
    shared = {name: parameter for name, parameter in parameters.items() if name.endswith(".shared_A")}
    task_T = torch.cat([torch.full((len(sample.input_ids),), sample.task_id) for sample in samples])
    by_task = []
    for task in range(3):
        own = [of_sample.sum() for of_sample, sample in zip(ce, samples, strict=True) if sample.task_id == task]
        part = sum(own) / sum(map(len, ce)) + COEFFICIENT * balance_of(task_T == task)
        by_task.append(torch.autograd.grad(part, list(shared.values()), retain_graph=True, materialize_grads=True))
    projected = dict(zip(shared, map(conflict_reference, zip(*by_task, strict=True)), strict=True))
    return [projected.get(name, gradient) for name, gradient in zip(parameters, gradients, strict=True)]


def _objective(case: dict[str, Any], step: int, loss: Tensor, balance: Tensor, logits: list[Tensor]) -> Tensor:
    """What is minimised: the loss, the balance loss by its schedule, and the z-loss."""
    given = {"schedule": "constant", "last_step": 0, "z_coefficient": 0.0} | case.get("balance", {})
    coefficient = coefficient_reference(given["schedule"], COEFFICIENT, step, given["last_step"])
    total = loss + coefficient * balance
    if given["z_coefficient"]:
        total = total + given["z_coefficient"] * sum(map(z_loss_reference, logits)) / len(logits)
    return total


def _forward(model: nn.Module, samples: Sequence[Sample], step: int) -> tuple[list[Tensor], list[Routed], list[Tensor]]:
    """Cross-entropies of each sample, run on its own; probabilities and choices, and logits, of all tokens by layer."""
    layers = [layer for _, layer in mixture_layers(model)]
    ce, routings, routers = [], [], [list[Tensor]() for layer in layers if layer.balanced]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, x, kept=kept: kept.append(_logits(layer, x[0])))
        for layer, kept in zip((layer for layer in layers if layer.balanced), routers, strict=True)
    ]
    for sample in samples:
        set_token_keys(model, collate([sample]), SEED, step)
        ids = torch.as_tensor(sample.input_ids, dtype=torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        targets = ids[sample.prompt_length :]
        predicted = logits[sample.prompt_length - 1 : len(ids) - 1]
        ce.append(nn.functional.cross_entropy(predicted, targets, reduction="none"))
        routings.append([layer.routing for layer in layers if layer.balanced])
    routed = [
        (torch.cat([routing.probs_TE for routing in of_layer]), torch.cat([r.expert_ids_TK for r in of_layer]))
        for of_layer in zip(*routings, strict=True)
    ]
    for hook in hooks:
        hook.remove()
    return ce, routed, [torch.cat(of_layer) for of_layer in routers]


def _logits(layer: Any, x: Tensor) -> Tensor:
    """A router's logits (T, E), where it reads the layer's input."""
    if layer.input_projection.reads_h:
        return x.new_zeros(0, layer.num_experts)
    return x[0].float() @ layer.input_projection.gate.T


def _balance(routed: list[Routed], earlier: list[Tensor] | None = None, mask_T: Tensor | None = None) -> Tensor:
    """The mean balance loss of all layers, with the choices of `earlier` tokens if they are given.

    With a mask (T,) the part of it that is of these tokens' probabilities.
    """
    before = [None] * len(routed) if earlier is None else earlier or [torch.zeros(0, 1)] * len(routed)
    losses = [balance_reference(*of_layer, mask_T, ids_TK) for of_layer, ids_TK in zip(routed, before, strict=True)]
    part = 1.0 if mask_T is None else float(mask_T.float().mean())
    return part * torch.stack(losses).mean() if losses else torch.zeros(())
