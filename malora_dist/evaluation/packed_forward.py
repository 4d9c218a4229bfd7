"""One micro-batch through the engine: the cross-entropy of each supervised token."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.data.loader import MicroBatch
from malora_dist.data.packed_row import PackedRow
from malora_dist.models.loss_head import loss_head
from malora_dist.models.packed_attention import attention_arguments
from malora_dist.models.packed_masks import packed_row
from malora_dist.ops.dropout import token_keys


def cross_entropies(engine: Callable[..., Any], row: PackedRow) -> Tensor:
    """Compute the fp32 cross-entropy (N,) of each supervised token; logits exist only where there is one.

    With a `models.loss_head.LossHead` they exist a chunk of tokens at a time, and backward needs none. The cache is
    off; `models.packed_attention` keeps the packed samples apart.
    """
    head = loss_head(engine)
    model = getattr(engine, "module", engine)
    N, kept = len(row.targets), row.target_index
    if head is None and N == row.input_ids.shape[1]:
        # One more, so that the logits of all tokens, which some models give whatever is asked for, are another number.
        kept = torch.cat([kept, kept[:1]])
    options = {
        "position_ids": row.position_ids,
        "use_cache": False,
        "logits_to_keep": kept,
        **attention_arguments(model, row),
    }
    with nullcontext() if head is None else head.loss_at(row.targets), packed_row(row):
        output = engine(input_ids=row.input_ids, **accepted(model, options))
    given: Tensor = output.logits
    if head is not None:
        return given
    logits_NV = given[0, :N] if given.shape[1] == len(kept) else given[0, row.target_index]
    return F.cross_entropy(logits_NV.float(), row.targets, reduction="none")


def accepted(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return those options that the model's forward knows, where it names all it knows.

    Code of others may know fewer; `evaluation.packing` then finds what its rows may hold.
    """
    known = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return options
    return {name: value for name, value in options.items() if name in known}


def set_token_keys(model: nn.Module, batch: MicroBatch, seed: int, step: int) -> None:
    """Set the dropout keys of the next forward on every adapted layer, and let it keep the routing of each call.

    Dropout masks then do not depend on ranks.
    """
    keys_T = token_keys(seed, step, batch.sample_ids[batch.token_sample], batch.position_ids[0])
    for _, layer in mixture_layers(model):
        layer.token_keys, layer.routings = keys_T, []
