"""The frozen base model: read tensor by tensor, quantised to 4 bits, placed at once.

Only a reading process ever holds a full-precision weight, and only one at a time. `place` then decides where the
result lives: it stays (one process), is broadcast (replicated), or is broadcast and partitioned (ZeRO-3). With
`place_part` nothing is sent: every process reads its own part of each tensor, and no process ever holds a whole one.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.models.buffers import rebuild_buffers
from malora_dist.models.config import read_model_config, read_tokenizer
from malora_dist.models.linears import is_conv1d, linear_sizes
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.models.packed_attention import register_attention
from malora_dist.models.weights.base_tensor import BaseTensor, Weights
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.prequantized import check_stored_format
from malora_dist.models.weights.stored_names import StoredAs
from malora_dist.models.weights.ties import untie

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Place = Callable[[list[nn.Parameter]], None]
ReadPart = Callable[[int, int], Tensor]
PlacePart = Callable[[tuple[int, ...], torch.dtype, ReadPart], nn.Parameter]
Names = Callable[[], list[str]]
NOTHING: Mapping[str, StoredAs] = MappingProxyType({})


def stay(parameters: list[nn.Parameter]) -> None:
    """Leave parameters where they are: the placement of a single process."""


def load_base_model(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    load_in_4bit: bool = True,
    double_quant: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    reader: bool = True,
    place: Place = stay,
    place_part: PlacePart | None = None,
    agree: Callable[[Names], list[str]] = lambda names: names(),
) -> "PreTrainedModel":
    """Load the causal LM in `folder`, frozen, on `device`; linears other than the head 4-bit if `load_in_4bit`.

    `weights` gives the values, by default from the folder itself. `reader` says whether this process reads; the others
    allocate tensors of the same shape one at a time and get the values from `place`, which every process calls with
    the same parameters in the same order. `place_part(shape, dtype, read_part)` instead makes a parameter from the
    elements it asks `read_part(start, stop)` for; every process reads then. The folder's own weights have no parts
    where they must be quantised.

    `attn_implementation` is a name of transformers or of `models.packed_attention`, None for what the family has.
    `agree(find)` gives every process what `find` finds on one of them: tied parameters with values of their own.

    Raises ConfigError if a weight is missing or has another shape than the configuration says, if the folder's weights
    are stored in a format that is not read, or if the family is not supported (`buffers`).
    """
    folder = Path(folder)
    model = build_empty_model(
        folder, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    check_stored_format(folder, load_in_4bit=load_in_4bit, double_quant=double_quant)
    reads = reader or place_part is not None
    if weights is None and reads:
        weights = CheckpointWeights(folder, device)
    _place_buffers(model, folder, torch.device(device))
    untie(model, agree(lambda: [] if weights is None else weights.untied_names(model)))
    maker = _ParameterMaker(weights if reads else None, torch.device(device), place, place_part)
    stored = weights.stored_names(model) if weights is not None and reads else {}
    tensors = base_tensors(model, stored, load_in_4bit=load_in_4bit, double_quant=double_quant)
    linears: dict[int, NF4Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        prefix = f"{name}." if name else ""
        own = {leaf: tensors[prefix + leaf] for leaf, _ in module.named_parameters(recurse=False)}
        if any(tensor.quantized for tensor in own.values()):
            # One module may stand in several places.
            linears[id(module)] = linears.get(id(module)) or _quantized_linear(module, own, maker)
            _replace(model, name, linears[id(module)])
        else:
            for leaf, tensor in own.items():
                module.register_parameter(leaf, maker.parameter(tensor))
    model.requires_grad_(False)
    model.eval()
    return model


def build_empty_model(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Build the model of a folder's config.json on the meta device: shapes without memory.

    Raises ConfigError without such a file, and where it names no model that transformers has.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    register_attention()
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # code of some 200 families, for numbers that nobody has tried together
        raise ConfigError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from error
    _keep_wide(model, dtype)
    return model


def _keep_wide(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Let tensors be float32 that transformers loads in float32 whatever the model's dtype is."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if pattern.search(name):
            tensor.data = tensor.data.float()


def load_tokenizer(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load a model folder's tokenizer. Raises ConfigError if there is none, or if it names no end-of-sequence token."""
    tokenizer = read_tokenizer(Path(folder), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no eos_token, which ends every response")
    return tokenizer


def base_tensors(
    model: nn.Module, stored: Mapping[str, StoredAs] = NOTHING, *, load_in_4bit: bool, double_quant: bool
) -> dict[str, BaseTensor]:
    """Return the tensors of an empty base model, by every name a parameter has; tied parameters are one tensor.

    `stored` is where a checkpoint holds them, if not under their own names.
    """
    names = names_of_parameters(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [module for module in model.modules() if linear_sizes(module) is not None and module is not head]
    quantized = {id(linear.weight) for linear in linears} if load_in_4bit else set()
    tensors: dict[str, BaseTensor] = {}
    for parameter in model.parameters():
        own = names[id(parameter)]
        is_quantized = id(parameter) in quantized
        source = next((stored[name] for name in own if name in stored), StoredAs(tuple(own)))
        tensor = BaseTensor(
            # `blob` is what folders of prepared bases call a packed weight.
            name=own[0].removesuffix("weight") + "blob" if is_quantized else own[0],
            sources=source.names,
            conversion=source.conversion,
            weight_shape=tuple(parameter.shape),
            weight_dtype=parameter.dtype,
            quantized=is_quantized,
            double_quant=is_quantized and double_quant,
        )
        tensors.update(dict.fromkeys(own, tensor))
    return tensors


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter, by its id, in the order of the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


class _ParameterMaker:
    """Makes each parameter once, even if several modules share it."""

    def __init__(
        self, weights: Weights | None, device: torch.device, place: Place, place_part: PlacePart | None
    ) -> None:
        self.weights, self.device, self.place, self.place_part = weights, device, place, place_part
        self.made: dict[BaseTensor, nn.Parameter] = {}

    def parameter(self, tensor: BaseTensor) -> nn.Parameter:
        if tensor not in self.made:
            self.made[tensor] = self._part(tensor) if self.place_part is not None else self._whole(tensor)
        return self.made[tensor]

    def _whole(self, tensor: BaseTensor) -> nn.Parameter:
        if self.weights is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        else:
            value = self.weights.read(tensor).to(self.device)
        parameter = nn.Parameter(value, requires_grad=False)
        self.place([parameter])
        return parameter

    def _part(self, tensor: BaseTensor) -> nn.Parameter:
        assert self.place_part is not None and self.weights is not None
        return self.place_part(tensor.shape, tensor.dtype, partial(self.weights.read_part, tensor))


def _quantized_linear(linear: nn.Module, own: dict[str, BaseTensor], maker: _ParameterMaker) -> NF4Linear:
    tensor, sizes = own["weight"], linear_sizes(linear)
    assert sizes is not None
    # The packed weight may be placed elsewhere by now; a linear is made around its shape alone.
    shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    layout = {"transposed": is_conv1d(linear), "weight_dtype": tensor.weight_dtype}
    quantized = NF4Linear(shape, None, *sizes, tensor.double_quant, **layout)  # type: ignore[arg-type]
    quantized.bias = maker.parameter(own["bias"]) if "bias" in own else None
    quantized.packed_weight = maker.parameter(tensor)
    return quantized


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _place_buffers(model: "PreTrainedModel", folder: Path, device: torch.device) -> None:
    """Compute the buffers of an empty model, read those that the folder's checkpoint holds, and move them.

    They are small, so every process does. Raises ConfigError for one that has no value.
    """
    unwritten = rebuild_buffers(model)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    persistent = {name: buffers[name] for name in model.state_dict() if name in buffers}
    values: dict[str, Tensor] = {}
    if persistent:
        weights = CheckpointWeights(folder)
        stored = weights.stored_names(model)
        for name, buffer in persistent.items():
            source = stored.get(name, StoredAs((name,)))
            if name in stored or name in unwritten:
                tensor = BaseTensor(name, source.names, tuple(buffer.shape), buffer.dtype, conversion=source.conversion)
                values[name] = weights.read(tensor)
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, values.get(name, buffer).to(device))
