"""Base tensors from a model folder in Hugging Face layout, quantised as they are read."""

import ctypes
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.files.tensor_file import TensorPlace
from malora_dist.models.weights.base_tensor import BaseTensor
from malora_dist.models.weights.prequantized import READ, STATE, is_stored_in_4bit, stored_blob
from malora_dist.models.weights.reader import TensorReader
from malora_dist.models.weights.stored_names import StoredAs, stored_names
from malora_dist.models.weights.ties import differing_ties
from malora_dist.ops.nf4 import quantize_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that older versions of transformers have saved.
LEFT_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)(masked_bias|position_ids)$", r"attn(ention)?\.bias$")


class CheckpointWeights:
    """Reads a model folder one tensor at a time, and quantises on `device`.

    Raises ConfigError for a weight that is missing or has another shape than the configuration says.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.reader = TensorReader(folder)
        self.device = torch.device(device)

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def stored_names(self, model: "PreTrainedModel") -> dict[str, StoredAs]:
        return stored_names(model, self.reader.names())

    def mistakes(self, model: "PreTrainedModel") -> list[str]:
        """Return what is wrong with the tensors of an empty model that the files hold, each file and size once.

        Only headers are read: they show files that are missing or cut short, and sizes that differ from the config's.
        """
        found: dict[str, None] = {}
        state = model.state_dict()
        for name, source in self.stored_names(model).items():
            try:
                places = [self.reader.place([part]) for part in source.names]
            except ConfigError as error:
                found[str(error)] = None
                continue
            is_4bit = any(self.reader.holds(f"{part}.{STATE}") for part in source.names)
            if state[name].is_floating_point() and not is_4bit:
                found |= dict.fromkeys(map(_no_fraction, source.names, places))
            if source.conversion is None and not is_4bit and places[0].shape != state[name].shape:
                found[_other_shape(source.names[0], places[0].shape, state[name].shape)] = None
        found.pop("", None)
        return list(found)

    def unread(self, model: "PreTrainedModel") -> list[str]:
        """Return the names in the files that an empty model does not read.

        Those that transformers knows to be left over are not among them.
        """
        read = {name for source in self.stored_names(model).values() for name in source.names}
        left_over = [re.compile(pattern) for pattern in (*(model._keys_to_ignore_on_load_unexpected or ()), *LEFT_OVER)]
        return [
            name
            for name in self.reader.names()
            if name not in read
            and name.rpartition(".")[0] not in read
            and name.removesuffix(f".{STATE}") not in read
            and not any(pattern.search(name) for pattern in left_over)
        ]

    def untied_names(self, model: "PreTrainedModel") -> list[str]:
        return differing_ties(model, self.stored_names(model), self.reader)

    def read(self, tensor: BaseTensor) -> Tensor:
        if tensor.quantized and is_stored_in_4bit(self.reader, tensor):
            return stored_blob(self.reader, tensor).to(self.device)
        # Rounded to the model's dtype before it is quantised, as transformers does.
        weight = self._whole(tensor).to(device=self.device, dtype=tensor.weight_dtype)
        if not tensor.quantized:
            return weight
        packed = quantize_nf4(weight, tensor.double_quant)
        del weight
        _return_freed_memory()
        return packed

    def read_part(self, tensor: BaseTensor, start: int, stop: int) -> Tensor:
        assert not tensor.quantized, "the scales of a part need the blocks around it"
        if tensor.conversion is not None:
            return self._whole(tensor).reshape(-1)[start:stop].to(tensor.weight_dtype)
        _check_shape(tensor, self.reader.place(tensor.sources).shape)
        return self.reader.read_part(tensor.sources, start, stop).to(tensor.weight_dtype)

    def _whole(self, tensor: BaseTensor) -> Tensor:
        if tensor.conversion is None:
            place = self.reader.place(tensor.sources)
            _check_shape(tensor, place.shape)
            if tensor.weight_dtype.is_floating_point and (said := _no_fraction(tensor.sources[0], place)):
                raise ConfigError(said)
            return self.reader.read(tensor.sources)
        try:
            made = tensor.conversion(lambda name: self.reader.read([name]).to(tensor.weight_dtype))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.reader.folder}: {tensor.name} cannot be made of {', '.join(tensor.sources)}: {error}"
            ) from error
        _check_shape(tensor, tuple(made.shape))
        return made


def _check_shape(tensor: BaseTensor, found: tuple[int, ...]) -> None:
    if found != tensor.weight_shape:
        raise ConfigError(_other_shape(tensor.sources[0], found, tensor.weight_shape))


def _no_fraction(name: str, place: TensorPlace) -> str:
    """Return the error for a weight stored as integers, empty for other numbers.

    Integers are a weight in a format that has its scales elsewhere, if there are any.
    """
    if place.dtype.is_floating_point:
        return ""
    return f"weight {name} is stored as {str(place.dtype).removeprefix('torch.')}: {READ}"


def _other_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"weight {name} has shape {tuple(found)}, the config says {tuple(wanted)}"


def _return_freed_memory() -> None:
    """Give freed heap pages back to the system where the C library can.

    Blobs that stay lie between temporaries that were freed, which otherwise keep the reading process as large as the
    full-precision model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
