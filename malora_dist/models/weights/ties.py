"""Parameters that a configuration ties although the checkpoint holds another value for each: they are not tied."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from malora_dist.models.weights.reader import TensorReader
from malora_dist.models.weights.stored_names import StoredAs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ELEMENTS_AT_ONCE = 2**22


def differing_ties(model: "PreTrainedModel", stored: Mapping[str, StoredAs], reader: TensorReader) -> list[str]:
    """Return the names of tied parameters whose value in the checkpoint differs from that of what they are tied to."""
    return [
        name
        for name, source in tied_names(model).items()
        if name in stored and source in stored and not _equal(reader, stored[name].names, stored[source].names)
    ]


def tied_names(model: "PreTrainedModel") -> dict[str, str]:
    """Return, by the second name of each tied parameter, the name that it is tied to."""
    named = dict(model.named_parameters(remove_duplicate=False))
    pairs = model.all_tied_weights_keys.items()
    return {name: source for name, source in pairs if name in named and named[name] is named.get(source)}


def untie(model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Make of each name of an empty model a parameter of its own."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        own = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, own)
        model.all_tied_weights_keys.pop(name)


def _equal(reader: TensorReader, names: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Return whether two stored tensors have the same shape and values; stop reading where they differ."""
    place, other = reader.place(names), reader.place(others)
    if place.shape != other.shape or place.dtype != other.dtype:
        return False
    for start in range(0, place.numel, ELEMENTS_AT_ONCE):
        stop = min(start + ELEMENTS_AT_ONCE, place.numel)
        if not torch.equal(reader.read_part(names, start, stop), reader.read_part(others, start, stop)):
            return False
    return True
