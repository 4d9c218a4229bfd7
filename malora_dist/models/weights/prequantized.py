"""Checkpoints that hold 4-bit weights already, in the layout of bitsandbytes: taken over bit by bit, or refused."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.files.json_text import parse_json
from malora_dist.models.weights.base_tensor import BaseTensor
from malora_dist.models.weights.reader import TensorReader, readable
from malora_dist.ops.bitsandbytes_import import without_kernel_warning
from malora_dist.ops.nf4 import pack_nf4, tables
from malora_dist.ops.nf4_layout import BLOCK, SCALE_BLOCK

with without_kernel_warning():
    import bitsandbytes.functional as bnb

STATE = "quant_state.bitsandbytes__nf4"
READ = "only bitsandbytes' nf4 in blocks of 64 is read, and weights that are not quantised"


def check_stored_format(folder: Path, *, load_in_4bit: bool, double_quant: bool) -> None:
    """Raise ConfigError if config.json names a quantisation that is not read, or not the one wanted."""
    with readable(folder / "config.json"):
        stored = parse_json((folder / "config.json").read_bytes(), lenient=True).get("quantization_config")
    if stored is None:
        return
    method = stored.get("quant_method", "bitsandbytes" if "load_in_4bit" in stored else None)
    kind = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else "8-bit"
    said = f"the model in {folder} is stored with quantization_config.quant_method={method!r}"
    if method != "bitsandbytes":
        raise ConfigError(f"{said}: {READ}")
    if kind != "nf4":
        raise ConfigError(f"{said} and {kind} weights: {READ}")
    if not load_in_4bit:
        raise ConfigError(f"{said} and 4-bit weights: model.load_in_4bit=false cannot be had from it")
    stored_double = bool(stored.get("bnb_4bit_use_double_quant"))
    if stored_double != double_quant:
        raise ConfigError(
            f"model.bnb_4bit_use_double_quant={_word(double_quant)}, but {said} and "
            f"bnb_4bit_use_double_quant={_word(stored_double)}; they must be equal"
        )


def _word(value: bool) -> str:
    return str(value).lower()


def is_stored_in_4bit(reader: TensorReader, tensor: BaseTensor) -> bool:
    """Return whether the checkpoint holds this weight as 4-bit codes; modules it skipped are stored as they were."""
    return any(reader.holds(f"{name}.{STATE}") for name in tensor.sources)


def stored_blob(reader: TensorReader, tensor: BaseTensor) -> Tensor:
    """Return the packed weight (`ops.nf4`) of one that bitsandbytes quantised. Raises ConfigError for other settings.

    Codes and scales of both are the same numbers; only their places in the file differ.
    """
    name = next(name for name in tensor.sources if reader.holds(f"{name}.{STATE}"))
    if tensor.conversion is not None:
        raise ConfigError(f"{name} is stored in 4 bits, and {tensor.name} is only a part of it or laid out otherwise")
    parts = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE]
    stored = {part: reader.read([f"{name}.{part}"]) for part in parts if reader.holds(f"{name}.{part}")}
    state = bnb.QuantState.from_dict(stored, torch.device("cpu"))
    _check_state(name, state, tensor)
    packed = pack_nf4(reader.read([name]), state)
    if packed.numel() != tensor.numel:
        raise ConfigError(f"{name} holds {packed.numel()} bytes of 4-bit weight instead of {tensor.numel}")
    return packed


def _check_state(name: str, state: Any, tensor: BaseTensor) -> None:
    known = tables(torch.device("cpu"))
    rules = {
        f"shape {tuple(tensor.weight_shape)}": tuple(state.shape) == tensor.weight_shape,
        f"blocks of {BLOCK}": state.blocksize == BLOCK,
        "the nf4 code": torch.equal(state.code, known.values),
        f"double quantisation {'on' if tensor.double_quant else 'off'}": state.nested == tensor.double_quant,
    }
    if state.nested:
        rules[f"scales in blocks of {SCALE_BLOCK}"] = state.state2.blocksize == SCALE_BLOCK
        rules["the 8-bit code of scales"] = torch.equal(state.state2.code, known.scale_values)
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigError(f"{name} is stored in 4 bits, but not with {', '.join(broken)}: {READ}")
