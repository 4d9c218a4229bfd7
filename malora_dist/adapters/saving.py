"""Makes `save_pretrained` of an adapted transformers model write its adapter.

transformers would write the base's weights under names that `from_pretrained` does not know, and then fill the model
with random numbers.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import Injected, injected_adapters
from malora_dist.adapters.io.from_model import save_model_adapter
from malora_dist.errors import ConfigError

# Arguments of transformers' and PEFT's `save_pretrained` that say nothing of an adapter in one safetensors file.
IGNORED = {"max_shard_size", "safe_serialization", "save_function", "save_original_format", "save_peft_format", "token"}


def check_arguments(push_to_hub: bool, others: Mapping[str, Any]) -> None:
    """Refuse what `save_pretrained` of an adapted model does not do.

    Raises:
        ConfigError: for `push_to_hub`.
        TypeError: for an argument that it does not know.
    """
    if push_to_hub:
        raise ConfigError("push_to_hub=True: save the adapter, and upload its folder by huggingface_hub.upload_folder")
    unknown = sorted(others.keys() - IGNORED)
    if unknown:
        raise TypeError(f"save_pretrained() got an unexpected keyword argument {unknown[0]!r}")


class SavePretrained:
    """Replaces a model's method `save_pretrained`, which transformers' Trainer calls too."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write an adapter folder for `load_adapter`. `state_dict`: values of a model whose own are in parts."""
        check_arguments(push_to_hub, others)
        if is_main_process:
            save_model_adapter(self.model, save_directory, state_dict)


def save_adapters_of(model: nn.Module, injected: Injected) -> None:
    """Keep what is on the model, and let transformers save and train it as it does a model of PEFT's."""
    attributes: dict[str, object] = {"injected_adapters": injected}
    if hasattr(model, "save_pretrained") and not getattr(model, "saves_adapters", False):
        attributes["save_pretrained"] = SavePretrained(model)
    if getattr(model, "is_quantized", False):
        # By this mark Trainer tells a quantised model that has adapters from one that cannot be trained.
        attributes["_hf_peft_config_loaded"] = True
    vars(model).update(attributes)


def release(model: nn.Module) -> None:
    """Undo `save_adapters_of`, and let what was trained before the adapters be trained again."""
    injected = injected_adapters(model)
    forget_adapters(model)
    for name in () if injected is None else injected.trained:
        model.get_parameter(name).requires_grad_(True)


def forget_adapters(model: nn.Module) -> None:
    """Undo `save_adapters_of`."""
    for name in ("injected_adapters", "save_pretrained", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
