"""The frozen base model: read tensor by tensor, quantised to 4 bits, placed at once.

Only a reading process ever holds a full-precision weight, and only one at a time. `place` then decides where the
result lives: it stays (one process), is broadcast (replicated), or is broadcast and partitioned (ZeRO-3). With
`place_part` nothing is sent: every process reads its own part of each tensor, and no process ever holds a whole one.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.nn.linears import is_conv1d, linear_sizes
from malora_dist.nn.nf4_linear import NF4Linear
from malora_dist.nn.packed_attention import register_attention
from malora_dist.weights.base_tensor import BaseTensor, Weights
from malora_dist.weights.checkpoint import CheckpointWeights
from malora_dist.weights.prequantized import check_stored_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Place = Callable[[list[nn.Parameter]], None]
ReadPart = Callable[[int, int], Tensor]
PlacePart = Callable[[tuple[int, ...], torch.dtype, ReadPart], nn.Parameter]


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
    weights: Weights | None = None,
    reader: bool = True,
    place: Place = stay,
    place_part: PlacePart | None = None,
) -> "PreTrainedModel":
    """The causal LM in `folder`, frozen, on `device`; linears other than the head 4-bit if `load_in_4bit`.

    `weights` gives the values, by default from the folder itself. `reader` says whether this process reads; the others
    allocate tensors of the same shape one at a time and get the values from `place`, which every process calls with
    the same parameters in the same order. `place_part(shape, dtype, read_part)` instead makes a parameter from the
    elements it asks `read_part(start, stop)` for; every process reads then. The folder's own weights have no parts
    where they must be quantised.

    `attn_implementation` is a name of transformers or of `nn.packed_attention`.

    Raises ConfigError if a weight is missing or has another shape than the configuration says, or if the folder's
    weights are stored in a format that is not read.
    """
    model = build_empty_model(folder, dtype=dtype, attn_implementation=attn_implementation)
    check_stored_format(folder, load_in_4bit=load_in_4bit, double_quant=double_quant)
    if weights is None and (reader or place_part is not None):
        weights = CheckpointWeights(folder, device)
    maker = _ParameterMaker(
        weights if reader or place_part is not None else None, torch.device(device), place, place_part
    )
    tensors = base_tensors(model, load_in_4bit=load_in_4bit, double_quant=double_quant)
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        own = {leaf: tensors[prefix + leaf] for leaf, _ in module.named_parameters(recurse=False)}
        if any(tensor.quantized for tensor in own.values()):
            _replace(model, name, _quantized_linear(module, own, maker))
        else:
            for leaf, tensor in own.items():
                module.register_parameter(leaf, maker.parameter(tensor))
    _rebuild_buffers(model, torch.device(device))
    model.requires_grad_(False)
    model.eval()
    return model


def build_empty_model(folder: Path, *, dtype: torch.dtype, attn_implementation: str = "sdpa") -> "PreTrainedModel":
    """The model of a folder's config.json on the meta device: shapes without memory. Raises ConfigError without one."""
    from transformers import AutoModelForCausalLM

    register_attention()
    config = read_model_config(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)


def read_model_config(folder: Path) -> "PreTrainedConfig":
    """Read a folder's config.json, without what a frozen base does not have. Raises ConfigError without one."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it holds no config.json")
    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    for name, value in vars(config).items():
        # The base is frozen, and its masks would depend on how samples are dealt to processes.
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says how files are stored, not how this model computes
    return config


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The model folder's tokenizer. Raises ConfigError if it names no end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no eos_token, which ends every response")
    return tokenizer


def base_tensors(model: nn.Module, *, load_in_4bit: bool, double_quant: bool) -> dict[str, BaseTensor]:
    """The tensors of an empty base model, by every name a parameter has; tied parameters are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [module for module in model.modules() if linear_sizes(module) is not None and module is not head]
    quantized = {id(linear.weight) for linear in linears} if load_in_4bit else set()
    tensors: dict[str, BaseTensor] = {}
    for parameter in model.parameters():
        sources = tuple(names[id(parameter)])
        is_quantized = id(parameter) in quantized
        tensor = BaseTensor(
            name=sources[0].removesuffix("weight") + "blob" if is_quantized else sources[0],
            sources=sources,
            weight_shape=tuple(parameter.shape),
            weight_dtype=parameter.dtype,
            quantized=is_quantized,
            double_quant=is_quantized and double_quant,
        )
        tensors.update(dict.fromkeys(sources, tensor))
    return tensors


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
    # The blob may be placed elsewhere by now; a linear is made around its shape alone.
    shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    layout = {"transposed": is_conv1d(linear), "weight_dtype": tensor.weight_dtype}
    quantized = NF4Linear(shape, None, *sizes, tensor.double_quant, **layout)  # type: ignore[arg-type]
    quantized.bias = maker.parameter(own["bias"]) if "bias" in own else None
    quantized.blob = maker.parameter(tensor)
    return quantized


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
        # On the CPU, as transformers does: a GPU rounds powers otherwise.
        with torch.device("cpu"):
            rebuilt = type(module)(config=model.config)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, rebuilt.to(device))
