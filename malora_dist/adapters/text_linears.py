"""Which linears of a model a loss on text trains token by token, found out on a twin without weights."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.models.linears import linear_sizes

# Enough for layers that compress tokens by the block.
TOKENS = 256


def reached_linears(model: nn.Module) -> frozenset[str] | None:
    """Names of the linears that read each token of a text, and from whose output a gradient leads to the logits.

    Parts for pictures and attention to an encoder are never called. What only chooses, as the index of sparse
    attention does, has no gradient. Some read blocks of tokens, or tokens of their own. None where this cannot be told
    without weights, or for a model that is not one of transformers.

    Where a model's code goes by numbers, which a twin without weights has not, it sees zeros, and finds one of whatever
    it looks for. Then those that are called are named; as one of many experts may be, with those of the same name but
    for its numbers.
    """
    if not hasattr(model, "config"):
        return None
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    tokens = min(TOKENS, longest) if longest > 0 else TOKENS
    # A mask is taken by most; without one, most look at numbers. What else a model's own code does is not known.
    for made_up, mask in product((False, True), (torch.zeros(1, 1, tokens, tokens, device="meta"), None)):
        with suppress(Exception), warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            twin = _twin(model)
            with _MadeUpNumbers() if made_up else nullcontext():
                input_ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
                reached = _reached(twin, input_ids, mask, trained=not made_up)
            return _with_their_like(twin, reached) if made_up else reached
    return None


class _MadeUpNumbers(TorchDispatchMode):
    """Lets code read numbers off tensors that have none: zeros, and the first place where it looks for places."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(1, args[0].dim(), dtype=torch.long, device="meta")
        return func(*args, **(kwargs or {}))


def _with_their_like(model: nn.Module, reached: frozenset[str]) -> frozenset[str]:
    kinds = {re.sub(r"\d+", "0", name) for name in reached}
    return frozenset(name for name, _ in model.named_modules() if re.sub(r"\d+", "0", name) in kinds)


def _twin(model: Any) -> nn.Module:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        twin: nn.Module = type(model)(config)
    return twin.requires_grad_(False).eval()


def _reached(twin: nn.Module, input_ids: Tensor, mask: Tensor | None, *, trained: bool) -> frozenset[str]:
    """Names of the linears that read each token; with `trained` those alone from which a gradient leads to logits."""
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
        logits = twin(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        if trained:
            logits.sum().backward()
    # Those of the text, with what a model may put before it.
    usual = Counter(rows.values()).most_common(1)[0][0]
    return frozenset(
        name for name, mark in marks.items() if rows[name] == usual and (mark.grad is not None or not trained)
    )
