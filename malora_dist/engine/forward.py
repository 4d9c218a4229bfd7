"""One micro-batch through the engine: cross-entropies, and the balance loss of every router."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.data.loader import MicroBatch
from malora_dist.data.packed_row import PackedRow
from malora_dist.functional.balance import expert_statistics, load_balancing_loss
from malora_dist.functional.dropout import token_keys
from malora_dist.nn.head import loss_head
from malora_dist.nn.inject import mixture_layers
from malora_dist.nn.packed_attention import attention_arguments
from malora_dist.nn.packed_masks import packed_row
from malora_dist.parallel.groups import sum_over_processes


@dataclass(frozen=True)
class BalanceSettings:
    """How router statistics become a loss. scope: `global` counts over all processes, `local` over this one."""

    coefficient: float
    reduction: str
    scope: str


def cross_entropies(engine: Callable[..., Any], row: PackedRow) -> Tensor:
    """(N,) fp32 cross-entropy of each supervised token; logits exist only where there is one.

    With a `nn.head.LossHead` they exist a chunk of tokens at a time, and backward needs none. The cache is off;
    `nn.packed_attention` keeps the packed samples apart.
    """
    head = loss_head(engine)
    model = getattr(engine, "module", engine)
    options = {
        "position_ids": row.position_ids,
        "use_cache": False,
        "logits_to_keep": row.target_index,
        **attention_arguments(model, row),
    }
    with nullcontext() if head is None else head.loss_at(row.targets), packed_row(row):
        output = engine(input_ids=row.input_ids, **accepted(model, options))
    given: Tensor = output.logits
    if head is not None:
        return given
    logits_NV = given[0] if given.shape[1] == len(row.targets) else given[0, row.target_index]
    return F.cross_entropy(logits_NV.float(), row.targets, reduction="none")


def accepted(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return those options that the model's forward knows, where it names all it knows.

    Code of others may know fewer; `engine.packing` then finds what its rows may hold.
    """
    known = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return options
    return {name: value for name, value in options.items() if name in known}


def set_token_keys(model: nn.Module, batch: MicroBatch, seed: int, step: int) -> None:
    """Tell every adapted layer which samples its next forward sees, for dropout masks that do not depend on ranks."""
    keys_T = token_keys(seed, step, batch.sample_ids[batch.token_sample], batch.position_ids[0])
    for _, layer in mixture_layers(model):
        layer.token_keys = keys_T


def balance_loss(
    model: nn.Module, batch: MicroBatch, num_tasks: int, settings: BalanceSettings, world_size: int
) -> tuple[Tensor, Tensor]:
    """This process's share of the balance loss (shares of all processes add up to the loss), and expert counts.

    The counts are (G, L, E): how often each task's tokens chose each expert of each layer, on this process. Layers
    whose tokens use every expert have nothing to balance and are not among the L. Call after forward, once: it takes
    every `layer.routing` away.
    """
    taken = [(layer.balanced, _take_routing(layer)) for _, layer in mixture_layers(model) if layer.routed]
    routings = [routing for balanced, routing in taken if balanced]
    if not routings:
        return batch.position_ids.new_zeros((), dtype=torch.float32), torch.zeros(num_tasks, 0, 0)
    task_T = batch.task_ids[batch.token_sample]
    statistics = expert_statistics(routings, task_T, num_tasks)
    counts_LE = statistics.counts_GLE.sum(dim=0)
    if settings.scope == "global":
        counts_LE = sum_over_processes(counts_LE.clone())
    top_k = routings[0].expert_ids_TK.shape[1]
    tokens = counts_LE[0].sum() / top_k
    losses_L = load_balancing_loss(counts_LE, statistics.prob_sum_LE, tokens, top_k)
    if settings.scope == "local":
        losses_L = losses_L / world_size
    return losses_L.mean() if settings.reduction == "mean" else losses_L.sum(), statistics.counts_GLE


def _take_routing(layer: Any) -> Any:
    routing, layer.routing = layer.routing, None
    assert routing is not None, "balance_loss before a forward"
    return routing
