"""The naive loop that training on many processes is compared with: no DeepSpeed, no packing, no ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.engine.forward import set_token_keys
from malora_dist.nn.inject import adapter_parameters, mixture_layers
from tests.engine.workers import (
    ACCUMULATION,
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
from tests.reference import adamw_reference_step, balance_reference, clip_reference, loss_reference


def reference_run(folder: str, case: dict[str, Any]) -> dict[str, Any]:
    """The same five steps in one process without DeepSpeed, packing or ranks: one sample a forward, naive sums."""
    model = build_model(folder, case, None, {}).train()
    names = [name for name, parameter in adapter_parameters(model) if parameter.requires_grad]
    parameters = [parameter for _, parameter in adapter_parameters(model) if parameter.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses, aux_losses, grad_norms, state = [], [], [], {}
    for step in range(1, STEPS + 1):
        samples = step_samples(step, case.get("lengths", LENGTHS))
        size = len(samples) // case.get("accumulation", ACCUMULATION)
        micro = [samples[start : start + size] for start in range(0, len(samples), size)]
        ce, aux = zip(*[_micro_batch(model, part, step) for part in micro], strict=True)
        tasks = [[[[s.task_id for s in part] for part in micro]]]
        loss = loss_reference([[list(ce)]], case.get("normalization", "token"), tasks)[0]
        balance = torch.stack(aux).mean()
        gradients = torch.autograd.grad(loss + COEFFICIENT * balance, parameters)
        state |= {f"gradient.{step}.{name}": g for name, g in zip(names, gradients, strict=True)}
        clipped, norm = clip_reference(gradients, MAX_NORM)
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(parameters, clipped, strict=True)):
                new, *moments_i = adamw_reference_step(
                    parameter,
                    gradient,
                    *moments[i],
                    step,
                    learning_rate=LEARNING_RATE,
                    epsilon=EPSILON,
                    weight_decay=0.01,
                )
                parameter.copy_(new)
                moments[i] = (moments_i[0], moments_i[1])
        losses.append(float(loss.detach()))
        aux_losses.append(float(balance.detach()))
        grad_norms.append(float(norm))
    for name, parameter, (first, second) in zip(names, parameters, moments, strict=True):
        state |= {name: parameter.detach(), f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
    return {"losses": losses, "aux_losses": aux_losses, "grad_norms": grad_norms, "state": state}


def _micro_batch(model: nn.Module, samples: Sequence[Sample], step: int) -> tuple[list[Tensor], Tensor]:
    """Cross-entropies of each sample, run on its own, and the balance loss over all their tokens."""
    layers = [layer for _, layer in mixture_layers(model)]
    ce, routings = [], []
    for sample in samples:
        set_token_keys(model, collate([sample]), SEED, step)
        ids = torch.as_tensor(sample.input_ids, dtype=torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        targets = ids[sample.prompt_length :]
        predicted = logits[sample.prompt_length - 1 : len(ids) - 1]
        ce.append(nn.functional.cross_entropy(predicted, targets, reduction="none"))
        routings.append([layer.routing for layer in layers])
    if not layers[0].balanced:
        return ce, torch.zeros(())
    losses = [
        balance_reference(
            torch.cat([routing[i].probs_TE for routing in routings]),
            torch.cat([routing[i].expert_ids_TK for routing in routings]),
        )
        for i in range(len(layers))
    ]
    return ce, torch.stack(losses).mean()
