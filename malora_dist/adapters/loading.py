"""Puts the adapter of a folder, checkpoint or run on a base model."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters, remove_adapters
from malora_dist.adapters.io.folder import AdapterTensors, open_adapter
from malora_dist.adapters.io.info import AdapterInfo, AnyPath
from malora_dist.adapters.io.weights import check_names
from malora_dist.errors import CheckpointError


def load_adapter(model: nn.Module, path: AnyPath) -> AdapterInfo:
    """Load the adapter of a folder, checkpoint or run onto a base model, in place.

    Raises CheckpointError as `open_adapter` does, and if the adapter's layers are not those of this base.
    """
    return put_adapter(model, open_adapter(path))


def put_adapter(
    model: nn.Module,
    tensors: AdapterTensors,
    whole: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> AdapterInfo:
    """Inject the adapter's layers into a base model and fill them, one tensor at a time. Raises as `load_adapter`.

    `whole` is that of `inject_adapters`. A model on which this fails is left without adapters.
    """
    info = tensors.info
    options: dict[str, Any] = {"lora_dropout": info.lora_dropout, "init_weights": False, "whole": whole}
    # Fused projections hand results on through memory of the model's, which calls from several threads would mix up.
    options["fuse_projections"] = False
    inject_adapters(model, info.spec, info.target_modules, **options)
    try:
        fill_parameters(dict(adapter_parameters(model)), tensors)
    except BaseException:
        # No layer whose memory was not filled may stay.
        remove_adapters(model)
        raise
    return info


@torch.no_grad()
def fill_parameters(
    parameters: Mapping[str, nn.Parameter], tensors: AdapterTensors, keep_on_error: bool = False
) -> None:
    """Copy an adapter's tensors into parameters of these names. Raises CheckpointError unless they are the same.

    With `keep_on_error` all tensors are read before the first is copied, so that what fails changes no parameter;
    otherwise one is in memory at a time.
    """
    check_names(tensors.path, parameters, tensors.shapes, "this base")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tensors.shapes[name]:
            raise CheckpointError(
                f"{tensors.path}: {name} has shape {tensors.shapes[name]}, this base needs {tuple(parameter.shape)}"
            )
    values = {name: tensors.read(name) for name in parameters} if keep_on_error else {}
    for name, parameter in parameters.items():
        parameter.copy_(values[name] if keep_on_error else tensors.read(name))
