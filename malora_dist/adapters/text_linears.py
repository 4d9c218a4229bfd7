"""Which linears of a model a loss on text trains token by token, found out on a twin without weights."""

import copy
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.models.linears import linear_sizes

# Enough for layers that compress tokens by the block.
TOKENS = 256


def reached_linears(model: nn.Module) -> frozenset[str] | None:
    """Names of the linears that read each token of a text, and from whose output a gradient leads to the logits.

    Parts for pictures and attention to an encoder are never called. What only chooses, as the index of sparse
    attention does, has no gradient. Some read blocks of tokens, or tokens of their own. None where this cannot be told
    without weights, or for a model that is not one of transformers.
    """
    if not hasattr(model, "config"):
        return None
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    tokens = min(TOKENS, longest) if longest > 0 else TOKENS
    # A mask is taken by most; without one, most look at numbers. What else a model's own code does is not known.
    for mask in (torch.zeros(1, 1, tokens, tokens, device="meta"), None):
        with suppress(Exception), warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            return _reached(_twin(model), torch.zeros(1, tokens, dtype=torch.long, device="meta"), mask)
    return None


def _twin(model: Any) -> nn.Module:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        # Of an adapted model (`adapters.malora_model`) the class that it was made of.
        twin: nn.Module = getattr(type(model), "base_class", type(model))(config)
    return twin.requires_grad_(False).eval()


def _reached(twin: nn.Module, input_ids: Tensor, mask: Tensor | None) -> frozenset[str]:
    marks: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def marked(name: str) -> Any:
        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            rows[name] = output.shape[:-1].numel()
            marks[name] = torch.zeros((), device="meta", requires_grad=True)
            return output + marks[name]

        return add

    for name, module in twin.named_modules():
        if linear_sizes(module) is not None:
            module.register_forward_hook(marked(name))
    with torch.device("meta"):
        twin(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    # Those of the text, with what a model may put before it.
    usual = Counter(rows.values()).most_common(1)[0][0]
    return frozenset(name for name, mark in marks.items() if mark.grad is not None and rows[name] == usual)
