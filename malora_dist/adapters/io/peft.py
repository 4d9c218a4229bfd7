"""Stock PEFT LoRA folders as a source: read where our one-expert layers are the same function, refused elsewhere."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from malora_dist.adapters.io.folder import (
    CONFIG,
    WEIGHTS,
    AdapterInfo,
    AdapterTensors,
    open_adapter,
    open_weights,
)
from malora_dist.adapters.io.info import PEFT_NAMES, PREFIX, AnyPath, read_config
from malora_dist.adapters.io.weights import weights_header
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.target_names import pattern_value
from malora_dist.errors import CheckpointError, ConfigError, brief, short
from malora_dist.files.folder import file_in

# What says nothing of the function, or is read below.
READ = {"peft_type", "task_type", "base_model_name_or_path", "revision", "target_modules", "r", "lora_alpha"}
READ |= {"lora_dropout", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights"}
# What narrows the targets: the file of weights says which layers are left.
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
READ |= set(NARROWING)
SILENT = {"auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "eva_config"}
# How the base's own weights lie, which its layers say themselves.
SILENT |= {"fan_in_fan_out"}
# Initial values that leave the base's own weights as they are.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


LARGEST = 2**31


def _are_names(value: Any) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(number) is int and number >= 0 for number in numbers)


VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "base_model_name_or_path": ("text or null", lambda value: value is None or isinstance(value, str)),
    "lora_dropout": (
        "a number of at least 0 and less than 1",
        lambda value: value is None or (type(value) in (int, float) and 0 <= value < 1),
    ),
    "rank_pattern": ("an object", lambda value: value is None or isinstance(value, dict)),
    "alpha_pattern": ("an object", lambda value: value is None or isinstance(value, dict)),
    "target_modules": ("a list of names, or text", _are_names),
    "exclude_modules": ("a list of names, or text", _are_names),
    "layers_to_transform": ("the number of a layer, or a list of them", _are_layers),
    "layers_pattern": ("a list of names, or text", _are_names),
}


def is_peft_folder(path: AnyPath) -> bool:
    """Return whether the folder holds an adapter of PEFT rather than one of ours."""
    return (Path(path) / CONFIG).is_file() and "malora" not in read_config(Path(path))


def open_lora(path: AnyPath) -> AdapterTensors:
    """Open the adapter of a PEFT folder, or of whatever `open_adapter` takes."""
    return open_peft(path) if is_peft_folder(path) else open_adapter(path)


def open_peft(folder: AnyPath) -> AdapterTensors:
    """Open the LoRA or DoRA of a PEFT folder, as if it were a `lora` or `dora` adapter of ours.

    Raises CheckpointError if a file is missing, damaged, a pickle or outside the folder, or if the adapter is not
    exactly such a function; the message names the key of its config or file. `base_model` is "" where PEFT names none.
    """
    folder = Path(folder)
    file_in(folder, CONFIG)
    info = peft_info(folder, _layers(folder))
    tensors = open_weights(folder, info)
    _check_dtypes(folder)
    return tensors


def peft_info(folder: Path, layers: Sequence[str]) -> AdapterInfo:
    """Read a folder's adapter_config.json as that of a LoRA on these layers. Raises CheckpointError as `open_peft`."""
    config = read_config(folder)
    _check_config(folder, config)
    try:
        return AdapterInfo(
            spec=mixture_spec(
                "dora" if config.get("use_dora") else "lora",
                use_rslora=bool(config.get("use_rslora")),
                **_ranks_and_alphas(folder, config, layers),
            ),
            target_modules=_targets(config, layers),
            base_model=config.get("base_model_name_or_path") or "",
            lora_dropout=float(config.get("lora_dropout") or 0.0),
        )
    except (AttributeError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged: {error}") from error


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    if "malora" in config:
        raise CheckpointError(f"{folder} is an adapter of malora_dist already; --to adapter copies it")
    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM", None),
        "bias": ("none", None),
        "init_lora_weights": INITS,
        "use_dora": (True, False, None),
        "use_rslora": (True, False, None),
    }
    allowed |= dict.fromkeys(config.keys() - READ - SILENT, (None, False, "none"))
    for key, values in allowed.items():
        value = config.get(key, values[0])
        # 1 equals true, and is none.
        if not any(value == known and type(value) is type(known) for known in (*values, {}, [])):
            why = (
                "it changes the weights of the base model"
                if key == "init_lora_weights"
                else "malora_dist has no equivalent"
            )
            raise CheckpointError(f"{folder / CONFIG}: {brief(key)}={brief(json.dumps(value))} is not supported: {why}")
    for key, (rule, holds) in VALUES.items():
        if not holds(config.get(key)):
            raise CheckpointError(f"{folder / CONFIG}: {key}={brief(json.dumps(config.get(key)))} must be {rule}")


def _ranks_and_alphas(folder: Path, config: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Return r and lora_alpha, and the patterns where layers differ in them. Unused values are not checked."""
    numbers: dict[str, Any] = {}
    for key, pattern, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", float)):
        patterns, usual = config.get(pattern) or {}, config.get(key)
        found = {layer: pattern_value(tuple(patterns.items()), layer, usual) for layer in layers}  # type: ignore[arg-type]
        wrong = next((value for value in found.values() if not _is_number(value, kind)), None)
        if wrong is not None:
            what = "an integer of at least 1" if kind is int else "a positive number"
            raise CheckpointError(f"{folder / CONFIG}: {key}={short(wrong)} must be {what}")
        if len(set(found.values())) > 1:
            numbers[pattern] = {name: kind(value) for name, value in patterns.items() if _is_number(value, kind)}
        one: Any = usual if pattern in numbers and _is_number(usual, kind) else next(iter(found.values()))
        numbers[key] = kind(one)
    return numbers


def _is_number(value: Any, kind: type) -> bool:
    return type(value) in (int, kind) and 0 < value < LARGEST


def _layers(folder: Path) -> list[str]:
    """Return the adapted layers' names. Raises CheckpointError for a tensor that is no factor of a linear's LoRA."""
    names = tuple(f".{name}" for name in PEFT_NAMES.values())
    layers: dict[str, None] = {}
    for key in weights_header(folder):
        end = next((name for name in names if key.endswith(name)), None)
        if end is None or not key.startswith(PREFIX):
            raise CheckpointError(f"{folder / WEIGHTS}: tensor {brief(key)} is not part of a LoRA on a linear layer")
        layers[key.removeprefix(PREFIX).removesuffix(end)] = None
    if not layers:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensor")
    return list(layers)


def _targets(config: Mapping[str, Any], layers: Sequence[str]) -> tuple[str, ...]:
    """Return PEFT's list of targets, which means the same as ours.

    For a pattern, `all-linear` or a list that other keys narrow, return the names of the layers found.
    """
    targets = config.get("target_modules")
    if isinstance(targets, list) and all(config.get(key) in (None, "", []) for key in NARROWING):
        return tuple(sorted(targets))
    return tuple(layers)


def _check_dtypes(folder: Path) -> None:
    for key, place in weights_header(folder).items():
        if place.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is {place.dtype}; ours are float32, which would round it")
