"""DeepSpeed's own checkpoints of a PEFT LoRA run as adapters of ours, read without running what their pickles say.

Stages 0 to 2 keep the model's weights in `mp_rank_00_model_states.pt`. Stage 3 keeps parts: each rank's
`[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` holds, one parameter after another, its part of the fp32 masters, and
the model states hold their shapes.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import CONFIG, AdapterInfo, fill_adapter_folder, open_adapter
from malora_dist.adapters.io.info import PREFIX
from malora_dist.adapters.io.peft import peft_info
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.checkpoint.detect import detect_kind
from malora_dist.convert.job import Job
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.folder import file_in

MODEL = "mp_rank_00_model_states.pt"
MODEL_PART, OPTIMIZER_PART = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_A|lora_B|lora_magnitude_vector)\.(?P<adapter>[^.]+)(\.weight)?")
OURS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}


class _Ignored:
    """Stands in for DeepSpeed's own classes, of which nothing is needed; the pickle's own code never runs."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What the optimizer's files name; model states name nothing.
IGNORED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    # By which Python before 3.11.4 names a member of an enumeration.
    "__builtin__.getattr",
    "builtins.getattr",
)


def from_deepspeed(job: Job) -> None:
    """Write an adapter folder from `global_stepN`, or from the folder of them whose `latest` names one.

    What DeepSpeed does not store comes from an adapter_config.json in either folder, else from --lora-alpha and
    --base; without a config the LoRA counts as not rank-stabilised and without dropout. Raises CheckpointError for
    experts in shards, for parameters trained beside the LoRA, and for what is missing or damaged.
    """
    folder = _tag_folder(job.source)
    try:
        tensors = _factors(folder, _stage_3(folder) if _is_stage_3(folder) else _below_3(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its files are not what DeepSpeed writes: {error!r}") from error
    info = _info(job, folder, tensors)
    shapes = _checked_shapes(folder, info, tensors)
    values = (tensors[name] for name in shapes)
    fill_adapter_folder(job.folder, info, shapes, values, model_card(info, (), {}))
    if job.options.verify:
        _verify(job, tensors)


def _tag_folder(path: Path) -> Path:
    """Find the folder with the files. Raises CheckpointError if it is not DeepSpeed's or holds what cannot be read."""
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name != tag or not (path / tag).is_dir():
            raise CheckpointError(f"{path / 'latest'} names {tag!r}, which is not a folder next to it")
        path = path / tag
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    experts = [name for name in names if "_expert_" in name or name.startswith("expp_rank_")]
    if experts:
        raise CheckpointError(
            f"{path / experts[0]} holds one rank's experts; DeepSpeed's files do not say which they are of all, so "
            "they cannot be put together again"
        )
    others = [name for name in names if re.match(r"(layer_|mp_rank_(?!00)|zero_pp_rank_\d+_mp_rank_(?!00))", name)]
    if others:
        raise CheckpointError(f"{path / others[0]} is of a model split by tensor or pipeline parallelism: not read")
    if MODEL not in names and not _is_stage_3(path):
        raise CheckpointError(f"{path} is not a DeepSpeed checkpoint: {detect_kind(path)}")
    return path


def _is_stage_3(folder: Path) -> bool:
    return (folder / MODEL_PART.format(0)).is_file()


def _below_3(folder: Path) -> dict[str, Tensor]:
    """Read the whole weights by name, frozen ones among them."""
    state = _load(folder, MODEL)
    _only_lora(folder / MODEL, [name for group in state.get("param_shapes") or [] for name in group])
    return dict(state["module"])


def _stage_3(folder: Path) -> dict[str, Tensor]:
    """Read the whole trained weights by name, put together from every rank's part, fp32."""
    shapes = {n: shape for group in _load(folder, MODEL_PART.format(0))["param_shapes"] for n, shape in group.items()}
    _only_lora(folder / MODEL_PART.format(0), list(shapes))
    first = _part(folder, 0)
    ranks = max(first["partition_count"]) if isinstance(first["partition_count"], list) else first["partition_count"]
    states = [first, *(_part(folder, rank) for rank in range(1, ranks))]
    flats = [torch.cat([flat.flatten() for flat in state["fp32_flat_groups"]]) for state in states]
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // ranks)
        parts = [flat[offset : offset + size] for flat in flats]
        if any(len(part) < size for part in parts):
            raise CheckpointError(f"{folder}: the parts end before {name}; are these files of different saves?")
        tensors[name] = torch.cat(parts)[: shape.numel()].view(shape)
        offset += size
    return tensors


def _part(folder: Path, rank: int) -> dict[str, Any]:
    name = OPTIMIZER_PART.format(rank)
    bf16 = f"bf16_{name}"
    state: dict[str, Any] = _load(folder, bf16 if (folder / bf16).is_file() else name)["optimizer_state_dict"]
    return state


def _load(folder: Path, name: str) -> dict[str, Any]:
    path = file_in(folder, name)
    try:
        with torch.serialization.safe_globals([(_Ignored, full_name) for full_name in IGNORED]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{path} cannot be read as plain tensors, without running code: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not what DeepSpeed writes: it holds a {type(state).__name__}")
    return state


def _only_lora(path: Path, trained: Sequence[str]) -> None:
    other = [name for name in trained if not FACTOR.fullmatch(name)]
    if other:
        raise CheckpointError(f"{path}: {other[0]} was trained too, and is not part of a LoRA on a linear layer")


def _factors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA's tensors with our names and shapes. Raises CheckpointError without any, or of several LoRAs."""
    found, adapters = {}, set()
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name.removeprefix("module."))
        if ".modules_to_save." in name or ".lora_embedding_" in name:
            raise CheckpointError(f"{folder}: {name} was trained too, and is not part of a LoRA on a linear layer")
        if match is None:
            continue
        adapters.add(match["adapter"])
        layer = match["layer"].removeprefix(PREFIX)
        found[f"{layer}.{OURS[match['factor']]}"] = (
            tensor[None] if match["factor"] != "lora_magnitude_vector" else tensor
        )
    if not found:
        raise CheckpointError(f"{folder} holds no tensor of a PEFT LoRA")
    if len(adapters) > 1:
        raise CheckpointError(f"{folder} holds the adapters {', '.join(sorted(adapters))}; only one can be read")
    return found


def _info(job: Job, folder: Path, tensors: Mapping[str, Tensor]) -> AdapterInfo:
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    config = next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if config is not None:
        if job.options.lora_alpha is not None:
            raise ConfigError(f"--lora-alpha is that of {config / CONFIG} already; leave it out")
        info = peft_info(config, layers)
        base = job.options.base or info.base_model
    else:
        if job.options.lora_alpha is None:
            raise ConfigError(
                f"DeepSpeed does not store lora_alpha: put PEFT's {CONFIG} into {folder}, or say --lora-alpha, --base"
            )
        rank = next(tensor.shape[1] for name, tensor in tensors.items() if name.endswith(".A"))
        method = "dora" if any(name.endswith(".magnitude") for name in tensors) else "lora"
        spec = mixture_spec(method, r=rank, lora_alpha=job.options.lora_alpha)
        info = AdapterInfo(spec=spec, target_modules=tuple(layers), base_model="", lora_dropout=0.0)
        base = job.options.base or ""
    if not base:
        raise ConfigError("the base model of the adapter is not known; give it with --base")
    return AdapterInfo(
        spec=info.spec, target_modules=info.target_modules, base_model=base, lora_dropout=info.lora_dropout
    )


def _checked_shapes(folder: Path, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in file order. Raises CheckpointError for a missing tensor, another shape, or NaN."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        A, B = tensors.get(f"{layer}.A"), tensors.get(f"{layer}.B")
        inputs, outputs = 0 if A is None else A.shape[-1], 0 if B is None else B.shape[1]
        shapes |= {f"{layer}.{name}": shape for name, shape in factor_shapes(info.spec, inputs, outputs).items()}
    for name in shapes.keys() | tensors.keys():
        if name not in tensors or name not in shapes or tuple(tensors[name].shape) != shapes[name]:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise CheckpointError(f"{folder}: {name} is {found}; {info.spec.method} has {shapes.get(name, 'none')}")
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{folder}: {name} holds numbers that are not finite")
    return shapes


def _verify(job: Job, tensors: Mapping[str, Tensor]) -> None:
    """Compare what was written with what was read. Raises CheckpointError for a tensor that differs."""
    written = open_adapter(job.folder)
    for name, tensor in tensors.items():
        if not torch.equal(written.read(name), tensor.float()):
            raise CheckpointError(f"verification failed, {job.target} is not written: {name} is not what was read")
    job.log(f"verified: {len(tensors)} tensors are those of DeepSpeed bit for bit, so max |d weight| is 0")
