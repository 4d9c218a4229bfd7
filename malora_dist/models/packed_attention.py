"""Attention of packed rows: samples behind one another in one row, none of which may attend to another.

Varlen kernels (FlashAttention) take the cumulative lengths of the samples and compute each sample alone: sum of
length^2 instead of T^2, and no mask. SDPA and eager attention take masks, which `models.packed_masks` makes. For
neither the host waits.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.models.packed_masks import Row, Window, register_masks

TORCH_VARLEN = "malora_varlen"
FLASH_VARLEN = "malora_varlen_fa2"
FULL = "full_attention"
OTHER = "choose model.attn_implementation=sdpa or eager"
# Models whose biases of distance count the tokens of the mask through the row, and round the counts to 8 bits.
COUNTING_MASK = ("bloom", "falcon")
# Models with a causal mask, or biases of distance, for so many tokens of a row, by the key that says how many.
ROW_LIMITS = {"gpt_neo": "max_position_embeddings", "mpt": "max_seq_len"}

# (q (T,H,D), k (T,G,D), v (T,G,D), cumulative lengths (S+1,), longest, scale, window or None) -> (T,H,D), causal
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]


def register_attention() -> None:
    """Register these attentions with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(TORCH_VARLEN, partial(varlen_attention, torch_varlen))
    AttentionInterface.register(FLASH_VARLEN, partial(varlen_attention, flash_attn_varlen))
    register_masks(TORCH_VARLEN, FLASH_VARLEN)


def varlen_attention(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Window | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a transformers model's layer: q (1,H,T,D), k and v (1,G,T,D) -> (1,T,H,D).

    The window is the one that the model has asked a mask for; not all models name it here. Raises ConfigError if the
    model asks for what these kernels do not compute, or hands no lengths on.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ConfigError(f"{type(module).__name__} hands no lengths of samples to its attention: {OTHER}")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    unknown += ["v of another width"] if value.shape[-1] != query.shape[-1] else []
    unknown += ["attention_mask"] if isinstance(attention_mask, Tensor) else []
    unknown += (
        [] if getattr(module, "is_causal", True) and others.get("is_causal") is not False else ["is_causal=False"]
    )
    unknown += [f"dropout={others['dropout']}"] if others.get("dropout") else []
    if unknown:
        raise ConfigError(f"{type(module).__name__}: varlen attention has no {', '.join(unknown)}: {OTHER}")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    window = attention_mask.tokens if isinstance(attention_mask, Window) else sliding_window
    return kernel(q, k, v, cu_seq_lens_q, max_length_q, scale, window)[None].contiguous(), None


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Call PyTorch's kernel. Its signature changed: 2.10 says `is_causal`, later versions say it as a window."""
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters(varlen_attn)
    options: dict[str, Any] = {"window_size": _window(window)} if "window_size" in known else {"is_causal": True}
    if "window_size" not in known and window is not None and longest > window:
        raise ConfigError(f"varlen attention of torch {torch.__version__} has no sliding window: {OTHER}")
    if "scale" in known:
        options["scale"] = scale
    elif not math.isclose(scale, q.shape[-1] ** -0.5):
        raise ConfigError(f"varlen attention of torch {torch.__version__} has no scale: {OTHER}")
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    result = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    assert isinstance(result, Tensor)
    return result


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Call the kernel of the package flash_attn."""
    from flash_attn import flash_attn_varlen_func

    result: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return result


def _window(window: int | None) -> tuple[int, int]:
    """Count the tokens that a token sees before and after itself; a window of transformers counts the token too."""
    return (-1 if window is None else window - 1, 0)


def is_masked(model: Any) -> bool:
    """Return whether the model's attention works on (T, T) masks, be they given or its own."""
    return model.config._attn_implementation in ("sdpa", "eager")


def is_varlen(model: Any) -> bool:
    """Return whether the model's attention is one of those of this file, which computes each sample alone."""
    return model.config._attn_implementation in (TORCH_VARLEN, FLASH_VARLEN)


def attention_arguments(model: Any, row: Row) -> dict[str, Any]:
    """Return the arguments of the model's forward for a packed row, inside `packed_row`; the host does not wait.

    One of them is a mask that hides nothing: without it transformers would look for samples in the positions.
    """
    shown = {"attention_mask": _nothing_hidden(model, row)}
    if is_masked(model):
        return shown
    assert row.token_branch is None
    lengths = length_arguments(row.cu_seq_lens, row.max_length)
    return lengths | (shown if is_varlen(model) else {"attention_mask": None})


def _nothing_hidden(model: Any, row: Row) -> Tensor:
    """Return the mask of a row, (1, T), whose sums along the row are positions + 1 where a model counts by them."""
    if model.config.model_type in COUNTING_MASK:
        return row.position_ids.diff(prepend=row.position_ids.new_full((1, 1), -1))
    return torch.ones_like(row.position_ids)


def longest_row(config: Any) -> int | None:
    """Return how many tokens a row may have at most, all samples together; None without such a limit."""
    key = ROW_LIMITS.get(config.model_type)
    return None if key is None else int(getattr(config, key))


def length_arguments(cu_seq_lens: Tensor, max_length: int) -> dict[str, Any]:
    """Return the arguments of varlen kernels: where each sample begins, and how long the longest is."""
    lengths = {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
    return lengths | {"max_length_q": max_length, "max_length_k": max_length}
