"""Fine-tune language models on many tasks with MALoRA, at the scale of DeepSpeed. Importing this imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from malora_dist.adapters.inject import adapter_state_dict, inject_adapters
    from malora_dist.adapters.io.folder import load_adapter
    from malora_dist.adapters.methods import MixtureSpec, mixture_spec
    from malora_dist.config import load_config
    from malora_dist.errors import MaloraError

__version__ = "0.1.0"

__all__ = [
    "MaloraError",
    "MixtureSpec",
    "__version__",
    "adapter_state_dict",
    "inject_adapters",
    "load_adapter",
    "load_config",
    "mixture_spec",
]

_HOME = {
    "MaloraError": "malora_dist.errors",
    "MixtureSpec": "malora_dist.adapters.methods",
    "adapter_state_dict": "malora_dist.adapters.inject",
    "inject_adapters": "malora_dist.adapters.inject",
    "load_adapter": "malora_dist.adapters.io.folder",
    "load_config": "malora_dist.config",
    "mixture_spec": "malora_dist.adapters.methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
