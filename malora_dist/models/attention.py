"""The attention of a run: what model.attn_implementation means for a model, a precision and a device."""

from contextlib import suppress
from typing import Any

import torch

from malora_dist.errors import ConfigError
from malora_dist.models.packed_attention import FLASH_VARLEN, FULL, TORCH_VARLEN
from malora_dist.ops.choices import VARLEN, fits_varlen

KEY = "model.attn_implementation"
FIRST_CAPABILITY = (8, 0)
# Layers that varlen kernels compute; others carry a state along the row, from one sample to the next.
VARLEN_LAYERS = {FULL, "sliding_attention"}
# Models that hand the lengths of samples to no attention.
WITHOUT_LENGTHS = ("nemotron",)


def attention_for(requested: str, config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Return what `choose_attention` gives on this machine."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_attention(requested, config, dtype.itemsize, capability, _has_flash_attn())


def _has_flash_attn() -> bool:
    """Return whether the package flash_attn can be used; one that was built for another torch cannot."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception:
        return False
    return True


def choose_attention(
    requested: str, config: Any, itemsize: int, capability: tuple[int, int] | None, flash_attn: bool
) -> str:
    """Return the name under which transformers knows the attention of a model with this configuration.

    capability: of the CUDA device, None without one. flash_attn: whether that package is installed. Raises ConfigError
    for what cannot be, before any weight is read.
    """
    model_class = _model_class(config)
    for_machine = _machine_obstacle(requested, itemsize, capability, flash_attn)
    if requested in VARLEN and for_machine:
        raise ConfigError(f"{KEY}={requested} {for_machine}")
    if requested in ("auto", *VARLEN) and not for_machine:
        for_model = _model_obstacle(config, model_class)
        if requested == "varlen" and for_model:
            raise ConfigError(f"{KEY}=varlen: {for_model}; choose sdpa or eager")
        if not for_model:
            return TORCH_VARLEN if requested == "varlen" or not flash_attn else FLASH_VARLEN
        if requested == "flash_attention_2":
            if not getattr(model_class, "_supports_flash_attn", False):
                raise ConfigError(f"{KEY}=flash_attention_2: {for_model}; choose auto or eager")
            return requested
    found = "sdpa" if requested != "eager" and getattr(model_class, "_supports_sdpa", True) else "eager"
    if requested == "sdpa" and found == "eager":
        raise ConfigError(f"{KEY}=sdpa: {model_class.__name__} does not compute with it; choose eager")
    return found


def _machine_obstacle(
    requested: str, itemsize: int, capability: tuple[int, int] | None, flash_attn: bool
) -> str | None:
    """Return why the kernels of varlen attention cannot run on this machine, as the end of a sentence, or None."""
    if capability is None:
        return "needs a CUDA GPU; choose auto or sdpa"
    if capability < FIRST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"needs a GPU of compute capability 8.0 or higher, this one has {found}; choose auto or sdpa"
    if itemsize != 2:
        return "needs model.dtype=bfloat16"
    if requested == "flash_attention_2" and not flash_attn:
        return "needs the package flash_attn (the extra `gpu`); varlen needs no package"
    return None


def _model_obstacle(config: Any, model_class: Any) -> str | None:
    """Return why a model's attention is not what varlen kernels compute, or None.

    Models without SDPA have sinks or capped scores.
    """
    flags = ("_supports_attention_backend", "_supports_flash_attn", "_supports_sdpa")
    text, kind = config.get_text_config(), config.model_type
    if not all(getattr(model_class, flag, False) for flag in flags):
        return f"the attention of {kind} cannot be replaced"
    if kind in WITHOUT_LENGTHS:
        return f"{kind} hands no lengths of samples to its attention"
    if not set(getattr(text, "layer_types", None) or [FULL]) <= VARLEN_LAYERS:
        return f"{kind} has layers that are no attention"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return f"{kind} caps its attention scores"
    if getattr(text, "v_head_dim", None) is not None:
        return f"values of {kind} have heads of a width of their own"
    width = _head_dim(text)
    if width is None or not fits_varlen(width):
        return f"heads of {width or 'several widths'} numbers are not a multiple of 8 up to 256"
    return None


def _head_dim(config: Any) -> int | None:
    """Return the width of a head, None where it is not one number."""
    # Configurations of several parts or widths raise errors of their own.
    with suppress(Exception):
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return None


def _model_class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
