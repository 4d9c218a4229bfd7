"""The attention of a run: what model.attn_implementation means for a model, a precision and a device."""

from importlib.util import find_spec
from typing import Any

import torch

from malora_dist.errors import ConfigError
from malora_dist.functional.attention_choice import MAX_VARLEN_HEAD_DIM, VARLEN, attention_on_cuda
from malora_dist.nn.packed_attention import FLASH_VARLEN, MASKED, TORCH_VARLEN, one_mask_fits

KEY = "model.attn_implementation"
FIRST_CAPABILITY = (8, 0)


def attention_for(requested: str, config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Return what `choose_attention` gives on this machine."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_attention(requested, config, dtype.itemsize, capability, find_spec("flash_attn") is not None)


def choose_attention(
    requested: str, config: Any, itemsize: int, capability: tuple[int, int] | None, flash_attn: bool
) -> str:
    """Return the name under which transformers knows the attention of a model with this configuration.

    capability: of the CUDA device, None without one. flash_attn: whether that package is installed. Raises ConfigError
    for what cannot be, before any weight is read.
    """
    model_class = _model_class(config)
    for_machine = _machine_obstacle(requested, itemsize, capability, flash_attn)
    for_model = _model_obstacle(config, model_class)
    if requested == "auto":
        wanted = attention_on_cuda(requested, itemsize, _head_dim(config))
        if wanted == "varlen" and not for_machine and not for_model:
            return FLASH_VARLEN if flash_attn else TORCH_VARLEN
        return _masked(config, model_class)
    if requested in VARLEN and for_machine:
        raise ConfigError(f"{KEY}={requested} {for_machine}")
    if requested == "flash_attention_2":
        return requested if for_model else FLASH_VARLEN
    if requested == "varlen":
        if for_model:
            raise ConfigError(f"{KEY}=varlen: {for_model}; choose sdpa or eager")
        return TORCH_VARLEN
    found = "eager" if requested == "eager" else _masked(config, model_class)
    if requested == "sdpa" and found == "eager":
        raise ConfigError(f"{KEY}=sdpa: {model_class.__name__} does not compute with it; choose eager")
    return found


def _masked(config: Any, model_class: Any) -> str:
    """SDPA with the mask of `nn.packed_attention`; with transformers' masks where layers need several; or eager."""
    if not getattr(model_class, "_supports_sdpa", True):
        return "eager"
    return MASKED if one_mask_fits(config, model_class) else "sdpa"


def _machine_obstacle(
    requested: str, itemsize: int, capability: tuple[int, int] | None, flash_attn: bool
) -> str | None:
    """Why the kernels of varlen attention cannot run here, as the end of a sentence."""
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
    """Why a model's attention is not what varlen kernels compute. Models without SDPA have sinks or capped scores."""
    flags = ("_supports_attention_backend", "_supports_flash_attn", "_supports_sdpa")
    if not all(getattr(model_class, flag, False) for flag in flags):
        return f"the attention of {config.model_type} cannot be replaced"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its attention scores"
    if _head_dim(config) > MAX_VARLEN_HEAD_DIM:
        return f"heads of {_head_dim(config)} numbers are above {MAX_VARLEN_HEAD_DIM}"
    if getattr(config, "v_head_dim", None) is not None:
        return f"values of {config.model_type} have heads of a width of their own"
    return None


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _model_class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
