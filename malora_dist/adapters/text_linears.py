"""Which linears of a model a loss on text does not train token by token, found out on a twin without weights."""

import copy
import inspect
import warnings
from collections import Counter
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.models.linears import linear_sizes, output_head

# Enough for layers that compress tokens by the block.
TOKENS = 256


def idle_linears(model: nn.Module) -> frozenset[str] | None:
    """Return the names of linears of a model's class that do not read each token, or whose output gets no gradient.

    Parts for images and attention to an encoder are never called. Linears that only choose, as the index of sparse
    attention does, have no gradient. Some read blocks of tokens, tokens of their own, or learned tokens alone, as what
    stands before the output head may. The head itself is not among them. Linears that were put on the model later are
    not considered. None if this cannot be determined without weights, or if the model is not one of transformers.
    """
    if not hasattr(model, "config"):
        return None
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    tokens = min(TOKENS, longest) if longest > 0 else TOKENS
    # A mask is taken by most; without one, most look at numbers. In training some draw numbers, and look at them; so do
    # experts with code of their own. What else a model's own code does is not known.
    masks = (torch.zeros(1, 1, tokens, tokens, device="meta"), None)
    for replace_experts, training, mask in product((False, True), (True, False), masks):
        with suppress(Exception), warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            twin = _twin(model, replace_experts).train(training)
            return _idle(twin, torch.zeros(1, tokens, dtype=torch.long, device="meta"), mask)
    return None


def _twin(model: Any, replace_experts: bool) -> nn.Module:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        # Of an adapted model (`adapters.malora_model`) the class that it was made of.
        twin: nn.Module = getattr(type(model), "base_class", type(model))(config)
    for module in list(twin.modules()) if replace_experts else ():
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            module.forward = _as_experts
    return twin.requires_grad_(False)


def _as_experts(hidden: Tensor, *others: Any) -> Tensor:
    """Return what has the shape and the gradients of what experts make of hidden states, choices and weights."""
    weights = (each for each in others if isinstance(each, Tensor) and each.is_floating_point())
    return sum((each.sum() for each in weights), hidden)


def _idle(twin: nn.Module, input_ids: Tensor, mask: Tensor | None) -> frozenset[str]:
    marks: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def marked(name: str) -> Any:
        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            rows[name] = output.shape[:-1].numel()
            marks[name] = torch.zeros((), device="meta", requires_grad=True)
            return output + marks[name]

        return add

    head = output_head(twin)
    linears = {name: module for name, module in twin.named_modules() if linear_sizes(module) is not None}
    for name, module in linears.items():
        module.register_forward_hook(marked(name))
    # As in training: logits of some tokens.
    kept = {"logits_to_keep": torch.tensor([0, 1])} if "logits_to_keep" in _known(twin) else {}
    with torch.device("meta"):
        twin(input_ids=input_ids, attention_mask=mask, use_cache=False, **kept).logits.sum().backward()
    # Those of the text, with what a model may put before it.
    usual = Counter(rows.values()).most_common(1)[0][0]
    reached = {name for name, mark in marks.items() if mark.grad is not None and rows[name] == usual}
    return frozenset(name for name, module in linears.items() if module is not head and name not in reached)


def _known(twin: nn.Module) -> Any:
    return inspect.signature(twin.forward).parameters
