"""Attention of packed rows: samples behind one another in one row, none of which may attend to another.

Two forms are registered with transformers. Varlen kernels (FlashAttention) take the cumulative lengths of the samples
and compute each sample alone: sum of length^2 instead of T^2, and no mask. SDPA takes a mask, which is made once for
all layers. For both transformers makes no mask of its own, so the host waits for nothing.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError

MASKED = "malora_sdpa"
TORCH_VARLEN = "malora_varlen"
FLASH_VARLEN = "malora_varlen_fa2"
FULL = "full_attention"
# Models that fail where they are given a mask of four dimensions.
OWN_MASKS = ("bloom",)
OTHER = "choose model.attn_implementation=sdpa or eager"

# (q (T,H,D), k (T,G,D), v (T,G,D), cumulative lengths (S+1,), longest, scale, window or None) -> (T,H,D), causal
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]


def register_attention() -> None:
    """Make the forms known to transformers, under names that its mask functions do not know."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(MASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionInterface.register(TORCH_VARLEN, partial(varlen_attention, torch_varlen))
    AttentionInterface.register(FLASH_VARLEN, partial(varlen_attention, flash_attn_varlen))


def varlen_attention(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a transformers model's layer: q (1,H,T,D), k and v (1,G,T,D) -> (1,T,H,D).

    Raises ConfigError if the model asks for what these kernels do not compute, or hands no lengths on.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ConfigError(f"{type(module).__name__} hands no lengths of samples to its attention: {OTHER}")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    unknown += ["v of another width"] if value.shape[-1] != query.shape[-1] else []
    unknown += ["attention_mask"] if attention_mask is not None else []
    unknown += (
        [] if getattr(module, "is_causal", True) and others.get("is_causal") is not False else ["is_causal=False"]
    )
    unknown += [f"dropout={others['dropout']}"] if others.get("dropout") else []
    if unknown:
        raise ConfigError(f"{type(module).__name__}: varlen attention has no {', '.join(unknown)}: {OTHER}")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return kernel(q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window)[None], None


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


def one_mask_fits(config: Any) -> bool:
    """Return whether a (1,1,T,T) mask can stand for all that a model would make: no layer has a window or chunks."""
    config = config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or [FULL])
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return layers == {FULL} and limits == [None, None]


def takes_mask(model: Any) -> bool:
    """Return whether the model, as it is loaded, attends by whatever mask it is given."""
    return is_masked(model) and one_mask_fits(model.config) and model.config.model_type not in OWN_MASKS


def is_masked(model: Any) -> bool:
    """Return whether the model's attention works on (T, T) masks, be they given or its own."""
    return model.config._attn_implementation in (MASKED, "sdpa", "eager")


def attention_arguments(
    model: Any,
    cu_seq_lens: Tensor,
    max_length: int,
    token_sample: Tensor,
    token_branch: Tensor | None = None,
) -> dict[str, Any]:
    """Return what the model's forward is to be told of a packed row; without waiting for the device.

    `token_branch` makes a tree of each sample: its tokens of branch 0, then branches that see 0 and themselves. Only
    where `takes_mask`.
    """
    if takes_mask(model) and (token_branch is not None or len(cu_seq_lens) > 2):
        dtype = model.get_input_embeddings().weight.dtype
        return {"attention_mask": packed_mask(token_sample, token_branch, dtype)}
    assert token_branch is None
    if is_masked(model):
        return {"attention_mask": None}
    lengths = {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
    return {"attention_mask": None, **lengths, "max_length_q": max_length, "max_length_k": max_length}


def packed_mask(token_sample_T: Tensor, token_branch_T: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores, (1, 1, T, T): 0 where a token sees another, else -inf.

    Kernels that convert or copy masks would do it in every layer: so it has the dtype of the scores, and rows that
    begin at multiples of 16 numbers.
    """
    T = len(token_sample_T)
    seen = (token_sample_T[:, None] == token_sample_T).tril_()
    if token_branch_T is not None:
        seen &= (token_branch_T == 0) | (token_branch_T[:, None] == token_branch_T)
    mask = torch.zeros(T, -(-T // 16) * 16, dtype=dtype, device=token_sample_T.device)[:, :T]
    return mask.masked_fill_(~seen, float("-inf"))[None, None]
