"""What a base model is made of, and where its values come from."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from malora_dist.models.weights.stored_names import Conversion, StoredAs
from malora_dist.ops.nf4_layout import nf4_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseTensor:
    """One frozen tensor of the base model.

    `name` is its own in the loaded model, `sources` are the names a checkpoint may hold it under, or with `conversion`
    those of the parts it is made of; `weight_shape` and `weight_dtype` those of the weight it stands for. A quantized
    one is kept as the bytes of `ops.nf4`.
    """

    name: str
    sources: tuple[str, ...]
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    quantized: bool = False
    double_quant: bool = False
    conversion: Conversion | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As kept in memory."""
        if self.quantized:
            return (nf4_bytes(math.prod(self.weight_shape), self.double_quant),)
        return self.weight_shape

    @property
    def dtype(self) -> torch.dtype:
        """As kept in memory."""
        return torch.uint8 if self.quantized else self.weight_dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Weights(Protocol):
    """Values of base tensors, each of its own `shape` and `dtype`. Raises ConfigError if one is missing or wrong."""

    @property
    def bytes_read(self) -> int:
        """Bytes this process took from files so far."""

    def stored_names(self, model: "PreTrainedModel") -> dict[str, StoredAs]:
        """Return where the tensors of an empty model are, by their names; none where they are under their own."""

    def untied_names(self, model: "PreTrainedModel") -> list[str]:
        """Return the names of tied parameters of an empty model that have a value of their own."""

    def read(self, tensor: BaseTensor) -> Tensor:
        """Return the whole tensor."""

    def read_part(self, tensor: BaseTensor, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flat tensor, without reading the others."""
