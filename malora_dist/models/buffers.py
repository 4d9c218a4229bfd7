"""Buffers of a model on the meta device, computed as transformers computes them when it loads a checkpoint."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.models.config import SUPPORTED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INITIALIZED = "_is_hf_initialized"


def rebuild_buffers(model: "PreTrainedModel") -> set[str]:
    """Give the buffers of an empty model their values, on the CPU; return the names that a checkpoint must hold.

    transformers' own initialisation of the model computes them; on the CPU, as a GPU rounds powers otherwise. Raises
    ConfigError for what it does not compute and no checkpoint holds.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if buffer.is_meta}
    if not buffers and not any(_others_on_meta(model)):
        return set()
    # What is not written keeps what it was filled with.
    zeros, ones = (_initialized(model, buffers, fill) for fill in (0, 1))
    unwritten = {name for name in buffers if not torch.equal(zeros[name], ones[name])}
    lost = [*sorted(unwritten - set(model.state_dict())), *_others_on_meta(model)]
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ConfigError(
            f"{type(model).__name__} is not supported: it keeps tensors that no checkpoint holds and that "
            f"transformers' initialisation does not compute ({shown}); {SUPPORTED}"
        )
    return unwritten


def _initialized(model: "PreTrainedModel", buffers: dict[str, Tensor], fill: int) -> dict[str, Tensor]:
    """Return the buffers as `_init_weights` leaves them; what it does not write is `fill`."""
    made: dict[int, Tensor] = {}
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        value = made.setdefault(id(buffer), torch.full_like(buffer, fill, device="cpu"))
        setattr(model.get_submodule(parent), leaf, value)
    parameters = list(model.parameters())
    for parameter in parameters:
        setattr(parameter, INITIALIZED, True)  # so that it stays as it is, and costs nothing
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        model.initialize_weights()
    for marked in (*parameters, *model.modules()):
        vars(marked).pop(INITIALIZED, None)
    return {name: made[id(buffer)] for name, buffer in buffers.items()}


def _others_on_meta(model: nn.Module) -> Iterator[str]:
    """Yield tensors without values that are neither parameters nor buffers: a checkpoint cannot fill them."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                yield f"{name}.{attribute}"
