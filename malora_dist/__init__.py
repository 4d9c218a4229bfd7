"""Fine-tune language models on many tasks with MALoRA, at the scale of DeepSpeed. Importing this imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from malora_dist.adapters.adapted_layers import adapter_state_dict
    from malora_dist.adapters.aux_loss import aux_loss
    from malora_dist.adapters.inject import inject_adapters
    from malora_dist.adapters.loading import load_adapter
    from malora_dist.adapters.malora_config import MaloraConfig
    from malora_dist.adapters.malora_model import MaloraModel, get_malora_model
    from malora_dist.adapters.methods import MixtureSpec, mixture_spec
    from malora_dist.config import load_config
    from malora_dist.errors import MaloraError

__version__ = "0.1.0"

__all__ = [
    "MaloraConfig",
    "MaloraError",
    "MaloraModel",
    "MixtureSpec",
    "__version__",
    "adapter_state_dict",
    "aux_loss",
    "get_malora_model",
    "inject_adapters",
    "load_adapter",
    "load_config",
    "mixture_spec",
]

_HOME = {
    "MaloraConfig": "malora_dist.adapters.malora_config",
    "MaloraError": "malora_dist.errors",
    "MaloraModel": "malora_dist.adapters.malora_model",
    "MixtureSpec": "malora_dist.adapters.methods",
    "adapter_state_dict": "malora_dist.adapters.adapted_layers",
    "aux_loss": "malora_dist.adapters.aux_loss",
    "get_malora_model": "malora_dist.adapters.malora_model",
    "inject_adapters": "malora_dist.adapters.inject",
    "load_adapter": "malora_dist.adapters.loading",
    "load_config": "malora_dist.config",
    "mixture_spec": "malora_dist.adapters.methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
