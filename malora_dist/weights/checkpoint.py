"""Base tensors from a model folder in Hugging Face layout, quantised as they are read."""

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.functional.nf4 import quantize_nf4
from malora_dist.weights.base_tensor import BaseTensor
from malora_dist.weights.prequantized import is_stored_in_4bit, stored_blob
from malora_dist.weights.reader import TensorReader


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

    def read(self, tensor: BaseTensor) -> Tensor:
        if tensor.quantized and is_stored_in_4bit(self.reader, tensor):
            return stored_blob(self.reader, tensor).to(self.device)
        self._check_shape(tensor)
        # Rounded to the model's dtype before it is quantised, as transformers does.
        weight = self.reader.read(tensor.sources).to(device=self.device, dtype=tensor.weight_dtype)
        if not tensor.quantized:
            return weight
        blob = quantize_nf4(weight, tensor.double_quant)
        del weight
        _return_freed_memory()
        return blob

    def read_part(self, tensor: BaseTensor, start: int, stop: int) -> Tensor:
        assert not tensor.quantized, "the scales of a part need the blocks around it"
        self._check_shape(tensor)
        return self.reader.read_part(tensor.sources, start, stop).to(tensor.weight_dtype)

    def _check_shape(self, tensor: BaseTensor) -> None:
        stored = self.reader.place(tensor.sources).shape
        if stored != tensor.weight_shape:
            raise ConfigError(
                f"weight {tensor.sources[0]} has shape {stored}, the config says {tuple(tensor.weight_shape)}"
            )


def _return_freed_memory() -> None:
    """Give freed heap pages back to the system where the C library can.

    Blobs that stay lie between temporaries that were freed, which otherwise keep the reading process as large as the
    full-precision model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
