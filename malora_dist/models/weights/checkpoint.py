"""Base tensors from a model folder in Hugging Face layout, quantised as they are read."""

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.models.weights.base_tensor import BaseTensor
from malora_dist.models.weights.prequantized import is_stored_in_4bit, stored_blob
from malora_dist.models.weights.reader import TensorReader
from malora_dist.models.weights.stored_names import StoredAs, stored_names
from malora_dist.models.weights.ties import differing_ties
from malora_dist.ops.nf4 import quantize_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            _check_shape(tensor, self.reader.place(tensor.sources).shape)
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
        raise ConfigError(f"weight {tensor.sources[0]} has shape {found}, the config says {tuple(tensor.weight_shape)}")


def _return_freed_memory() -> None:
    """Give freed heap pages back to the system where the C library can.

    Blobs that stay lie between temporaries that were freed, which otherwise keep the reading process as large as the
    full-precision model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
