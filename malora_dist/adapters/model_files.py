"""The adapters of a `MaloraModel` in files: read under a name, written, and as transformers' Trainer reads them."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.io.from_model import adapter_info, check_all_is_adapter, save_layers, save_model_adapter
from malora_dist.adapters.io.hub import adapter_folder
from malora_dist.adapters.io.info import PREFIX, WEIGHTS, file_key
from malora_dist.adapters.io.peft import open_lora
from malora_dist.adapters.loading import fill_parameters
from malora_dist.adapters.malora_config import MaloraConfig
from malora_dist.errors import CheckpointError, brief
from malora_dist.files.atomic import share_file

# The adapter of this name is in the folder itself, as PEFT has it.
DEFAULT_NAME = "default"
# Folders that Trainer writes, and reads back as a model's weights under this name.
TRAINER_FOLDER, TRAINER_WEIGHTS = re.compile(r"checkpoint-\d+"), "model.safetensors"


def load_named_adapter(
    model: Any, model_id: str | os.PathLike[str], name: str, is_trainable: bool, revision: str | None
) -> None:
    """Read the adapter of a folder or hub id under a name. See `MaloraModel.load_adapter`."""
    tensors = open_lora(adapter_folder(model_id, revision))
    adapters, config = model.malora_adapters, MaloraConfig.from_info(tensors.info)
    former, is_new = adapters.active, name not in adapters.configs
    if is_new:
        adapters.add(model, name, config, init_weights=False)
    elif adapters.configs[name].spec != config.spec:
        raise CheckpointError(
            f"{tensors.path} is {config.spec}, and the adapter {name!r} of the model {adapters.configs[name].spec}"
        )
    layers = adapters.layers(model, name)
    parameters = {f"{at}.{factor}": parameter for at, layer in layers.items() for factor, parameter in layer.factors()}
    try:
        fill_parameters(parameters, tensors, keep_on_error=not is_new)
    except BaseException:
        if is_new:
            _remove(model, name, former)
        raise
    for parameter in parameters.values():
        parameter.requires_grad_(is_trainable)
    if is_new and former:
        adapters.activate(model, former)
    if not is_trainable:
        model.eval()


def _remove(model: Any, name: str, former: str) -> None:
    """Take a new adapter off again, whose memory was not filled; the one that was active before is so again."""
    if former:
        model.malora_adapters.activate(model, former)
        model.malora_adapters.delete(model, name)
    else:
        remove_adapters(model)


@torch.no_grad()
def load_into(model: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> _IncompatibleKeys | None:
    """Load the tensors of an adapter's file into the active adapter; None if it is another kind of state dict.

    Raises CheckpointError unless each tensor of the adapter is there in its shape and, with `strict`, no other; nothing
    is loaded then.
    """
    if not any(key.startswith(PREFIX) for key in state_dict):
        return None
    info = adapter_info(model)
    parameters = {file_key(info, name): parameter for name, parameter in adapter_parameters(model)}
    for key, parameter in parameters.items():
        value = state_dict.get(key)
        if value is None or value.numel() != parameter.numel():
            shape = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
            raise CheckpointError(f"{key}: the state dict has {shape}, the adapter needs {tuple(parameter.shape)}")
    unexpected = sorted(state_dict.keys() - parameters.keys())
    if unexpected and strict:
        raise CheckpointError(
            f"{brief(unexpected[0])}: the adapter has no such tensor ({len(unexpected)} unknown); strict=False leaves "
            "them out"
        )
    for key, parameter in parameters.items():
        parameter.copy_(state_dict[key].view(parameter.shape))
    return _IncompatibleKeys([], unexpected)


def save_named_adapters(
    model: Any,
    save_directory: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None,
    selected: Sequence[str] | None,
) -> None:
    """Write adapters as `MaloraModel.save_pretrained` does."""
    adapters, root = model.malora_adapters, Path(save_directory)
    check_all_is_adapter(model)
    names = list(adapters.configs if selected is None else selected)
    for name in names:
        adapters.check(name)
    for name in names:
        folder = root if name == DEFAULT_NAME else root / name
        if name == adapters.active:
            save_model_adapter(model, folder, state_dict)
            if TRAINER_FOLDER.fullmatch(root.name):
                _link(folder / WEIGHTS, root / TRAINER_WEIGHTS)
        else:
            info, layers = adapter_info(model, adapters.injected(model, name)), adapters.layers(model, name)
            save_layers(folder, info, layers, {})


def _link(weights: Path, name: Path) -> None:
    """Give a file a second name; what has it now is replaced. A copy where the file system has no such thing."""
    partial = name.with_name(f"{name.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(weights, partial)
    except OSError:
        shutil.copyfile(weights, partial)
        share_file(partial)
    partial.replace(name)
