"""Adapter folders: adapter_config.json, adapter_model.safetensors and a model card, in the layout of PEFT.

Keys are `base_model.model.<layer>.<factor>`. A `lora` adapter is a stock PEFT LoRA, which other tools load; the routed
methods add a block `malora` to the config and keep their own factor names.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from malora_dist.errors import CheckpointError
from malora_dist.methods import METHODS, MixtureSpec
from malora_dist.nn.inject import adapter_parameters, inject_adapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FORMAT_VERSION = 1
# PEFT has one expert without the leading dimension.
PEFT_LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter folder says of its tensors."""

    spec: MixtureSpec
    target_modules: tuple[str, ...]
    base_model: str
    lora_dropout: float


def save_adapter(folder: Path, info: AdapterInfo, state: Mapping[str, Tensor], card: str) -> None:
    """Write the folder so that each file is either whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_to_file(info.spec, name, tensor) for name, tensor in state.items())
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    # safetensors makes files for their owner only; whoever may read the folder may read its weights.
    partial.chmod(folder.stat().st_mode & 0o666)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / WEIGHTS)
    _write_text(folder / CONFIG, json.dumps(_config(info), indent=2) + "\n")
    _write_text(folder / "README.md", card)


def read_adapter_info(folder: Path) -> AdapterInfo:
    """Read adapter_config.json. Raises CheckpointError if it is missing, damaged or not from this package."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        block = dict(config["malora"])
        version = block.pop("format_version")
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{folder / CONFIG}: format_version {version} is newer than {FORMAT_VERSION}")
        if block["method"] not in METHODS:
            raise CheckpointError(f"{folder / CONFIG}: method {block['method']!r} is not one of {', '.join(METHODS)}")
        return AdapterInfo(
            spec=MixtureSpec(**block),
            target_modules=tuple(config["target_modules"]),
            base_model=config["base_model_name_or_path"],
            lora_dropout=config["lora_dropout"],
        )
    except OSError as error:
        raise CheckpointError(f"{folder} is not an adapter folder: {CONFIG}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged or not written by malora_dist: {error!r}") from error


def load_adapter(model: nn.Module, folder: Path) -> AdapterInfo:
    """Put the folder's adapter on a base model: inject its layers and fill them.

    Raises CheckpointError if a file is missing or damaged, or if a tensor is missing, unknown or of another shape than
    the method on this base has.
    """
    info = read_adapter_info(folder)
    state = _read_weights(folder)
    inject_adapters(model, info.spec, info.target_modules, lora_dropout=info.lora_dropout)
    parameters = dict(adapter_parameters(model))
    _check_names(folder, parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {name} has shape {tuple(state[name].shape)}, "
                    f"this base needs {tuple(parameter.shape)}"
                )
            parameter.copy_(state[name])
    return info


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(_from_file(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items())
    except OSError as error:
        raise CheckpointError(f"{folder} is not an adapter folder: {WEIGHTS} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: {error}") from error


def _check_names(folder: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which this base does not"
        raise CheckpointError(f"{folder / WEIGHTS} {which} ({len(missing)} missing, {len(unknown)} unknown)")


def _config(info: AdapterInfo) -> dict[str, object]:
    return {
        "peft_type": "LORA" if not info.spec.structure.routed else info.spec.method.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base_model,
        "target_modules": list(info.target_modules),
        "r": info.spec.r,
        "lora_alpha": info.spec.lora_alpha,
        "lora_dropout": info.lora_dropout,
        "bias": "none",
        "inference_mode": True,
        "malora": {"format_version": FORMAT_VERSION, **asdict(info.spec)},
    }


def _to_file(spec: MixtureSpec, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    layer, _, factor = name.rpartition(".")
    if not spec.structure.routed:
        return f"{PREFIX}{layer}.{PEFT_LORA[factor]}", tensor[0].contiguous()
    return f"{PREFIX}{name}", tensor.contiguous()


def _from_file(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = name.removeprefix(PREFIX)
    for factor, peft in PEFT_LORA.items():
        if name.endswith(f".{peft}"):
            return name.removesuffix(peft) + factor, tensor[None]
    return name, tensor


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
