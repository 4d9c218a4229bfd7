"""The frozen base model: read layer by layer, quantised to 4 bits, placed at once.

Only the reading process ever holds a full-precision weight, and only one at a time. `place` then decides where the
result lives: it stays (one process), is broadcast (replicated), or is broadcast and partitioned (ZeRO-3).
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.functional.nf4 import nf4_bytes, quantize_nf4
from malora_dist.nn.nf4_linear import NF4Linear
from malora_dist.source import TensorReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Place = Callable[[list[nn.Parameter]], None]


def stay(parameters: list[nn.Parameter]) -> None:
    """Placement of a single process: parameters stay where they are."""


def load_base_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    load_in_4bit: bool = True,
    double_quant: bool = False,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    reader: bool = True,
    place: Place = stay,
) -> "PreTrainedModel":
    """The causal LM in `folder`, frozen, on `device`; linears other than the head 4-bit if `load_in_4bit`.

    `reader` says whether this process reads the files; the others allocate tensors of the same shape one at a time
    and get the values from `place`, which every process calls with the same parameters in the same order.

    Raises ConfigError if a weight is missing or has another shape than the configuration says.
    """
    model = build_empty_model(folder, dtype=dtype, attn_implementation=attn_implementation)
    loader = _Loader(model, TensorReader(folder) if reader else None, torch.device(device), place)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if load_in_4bit and isinstance(module, nn.Linear) and module is not head:
            _replace(model, name, loader.quantized_linear(module, double_quant))
        else:
            loader.materialise(module)
    _rebuild_buffers(model, torch.device(device))
    model.requires_grad_(False)
    model.eval()
    return model


def build_empty_model(folder: Path, *, dtype: torch.dtype, attn_implementation: str = "sdpa") -> "PreTrainedModel":
    """The model of a folder's config.json on the meta device: shapes without memory. Raises ConfigError without one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it holds no config.json")
    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The model folder's tokenizer. Raises ConfigError if it names no end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no eos_token, which ends every response")
    return tokenizer


class _Loader:
    """Gives meta parameters their values, each once even if several modules share it."""

    def __init__(self, model: nn.Module, reader: TensorReader | None, device: torch.device, place: Place) -> None:
        self.reader, self.device, self.place = reader, device, place
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        # Kept by meta parameter, which stays alive here so that its id stays unique.
        self.loaded: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def read(self, meta: nn.Parameter) -> Tensor | None:
        """The stored tensor, in the model's dtype on the device; None if this process does not read."""
        if self.reader is None:
            return None
        names = self.names[id(meta)]
        tensor = self.reader.read(names)
        if tensor.shape != meta.shape:
            raise ConfigError(f"weight {names[0]} has shape {tuple(tensor.shape)}, the config says {tuple(meta.shape)}")
        return tensor.to(device=self.device, dtype=meta.dtype)

    def parameter(self, meta: nn.Parameter) -> nn.Parameter:
        if id(meta) not in self.loaded:
            value = self.read(meta)
            value = torch.empty(meta.shape, dtype=meta.dtype, device=self.device) if value is None else value
            parameter = nn.Parameter(value, requires_grad=False)
            self.place([parameter])
            self.loaded[id(meta)] = (meta, parameter)
        return self.loaded[id(meta)][1]

    def materialise(self, module: nn.Module) -> None:
        for name, meta in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, self.parameter(meta))

    def quantized_linear(self, linear: nn.Linear, double_quant: bool) -> NF4Linear:
        weight = self.read(cast(nn.Parameter, linear.weight))
        if weight is None:
            blob = torch.empty(nf4_bytes(linear.weight.numel(), double_quant), dtype=torch.uint8, device=self.device)
        else:
            blob = quantize_nf4(weight, double_quant)
            del weight
            _return_freed_memory()
        bias = None if linear.bias is None else self.parameter(linear.bias)
        quantized = NF4Linear(blob, None, linear.in_features, linear.out_features, double_quant)
        quantized.bias = bias
        self.place([quantized.blob])
        return quantized


def _return_freed_memory() -> None:
    """Give freed heap pages back to the system where the C library can.

    Blobs that stay lie between temporaries that were freed, which otherwise keep the reading process as large as the
    full-precision model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _rebuild_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies), as the model's own initialisation does."""
    for name, module in model.named_modules():
        meta = [buffer for buffer, value in module.named_buffers(recurse=False) if value.is_meta]
        if not meta:
            continue
        if not hasattr(module, "original_inv_freq"):
            raise ConfigError(f"buffers {', '.join(meta)} of {name} ({type(module).__name__}) cannot be rebuilt")
        with torch.device(device):
            rebuilt = type(module)(config=model.config)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, rebuilt)
