"""`MaloraConfig`: a method with its numbers and where it goes, by the names and defaults of PEFT. Needs no torch."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from malora_dist.adapters.io.hub import adapter_folder
from malora_dist.adapters.io.info import CONFIG, PATTERNS, AdapterInfo, adapter_config, info_of, read_config
from malora_dist.adapters.io.rules import SETTINGS
from malora_dist.adapters.methods import MixtureSpec, mixture_spec
from malora_dist.adapters.scaling import LORA, RSLORA, SCALINGS
from malora_dist.adapters.target_names import ALL_LINEAR, Narrowing, number_in_list, whole_name
from malora_dist.errors import ConfigError, short
from malora_dist.files.durable import write_text

COMPUTATIONS = ("auto", "dense", "grouped", "grouped_triton")
Names = Sequence[str] | str | None


@dataclass(frozen=True)
class MaloraConfig:
    """Configuration of an adapter for `get_malora_model`.

    Fields that PEFT's `LoraConfig` has too have the same meaning and defaults. Fields that a method does not use (such
    as `top_k` with `lora`) are ignored. A `str` for a field of names is a list of one; lists become tuples.

    Args:
        method: `malora`, `molora`, `hydralora`, `lora` or `dora`.
        r: rank of each expert.
        num_experts, top_k: number of experts of each adapted linear, and of those selected for each token.
        shared_r: rank of the shared down-projection S_A of `malora`; None derives it from `compression_ratio`.
        compression_ratio: lambda of the paper, shared_r = lambda / (2 - lambda) * num_experts * r.
        lora_alpha: the output is scaled by lora_alpha / r, or as `scaling` says.
        scaling: `lora`, `rslora` (lora_alpha / sqrt(r)), or `gate_norm` or `gate_sum`, which give a mixture the scale
            of a single LoRA (`adapters.scaling`).
        use_rslora: PEFT's name of scaling="rslora".
        router_input: `x`, the layer's input, or `h`, the output of the shared down-projection, which the experts read.
        router_dtype: of the router's product: `float32`, or `input` for the dtype of what it reads.
        lora_dropout: dropout on the input of the down-projection; the router's input is not dropped.
        beta: initial scale of S_A relative to the experts' P_t (`malora`).
        normalize_gates: normalise the gates of each token's selected experts to sum to 1.
        router_aux_loss_coef: coefficient of the load-balancing loss in the loss that the model returns; 0 disables it.
        target_modules: suffixes of module names, regular expressions matched against full names, or `all-linear`.
            None: q, k, v, gate, up and down projections if the model has all of them, else `all-linear`.
        exclude_modules: modules not to adapt, written as in target_modules.
        layers_to_transform, layers_pattern: indices of the layers to adapt, and the names of the layer lists.
        rank_pattern, alpha_pattern: r and lora_alpha of modules whose name has a suffix that matches the regular
            expression.
        computation: `auto`, `dense`, `grouped` or `grouped_triton`; the result is the same.
        fuse_projections: compute S_A and the routers of linears with the same input (q, k, v; gate, up) in one matrix
            product. Forward passes must then not run in several threads.
        seed: random seed; initial values depend on it and on the layer's name alone.
        base_model_name_or_path, task_type: as in PEFT; `CAUSAL_LM` is the only task.
        fuse_siblings: deprecated name of `fuse_projections`.

    Raises:
        ConfigError: for an argument that breaks a rule, naming argument, value and rule.
    """

    method: str = "malora"
    r: int = 8
    num_experts: int = 8
    top_k: int = 2
    shared_r: int | None = None
    compression_ratio: float = 0.5
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    scaling: str = LORA
    router_input: str = "x"
    router_dtype: str = "float32"
    beta: float = 1.0
    normalize_gates: bool = False
    router_aux_loss_coef: float = 0.01
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    computation: str = "auto"
    fuse_projections: bool = False
    seed: int = 0
    base_model_name_or_path: str = ""
    task_type: str | None = "CAUSAL_LM"
    fuse_siblings: InitVar[bool | None] = None

    def __post_init__(self, fuse_siblings: bool | None) -> None:
        if fuse_siblings is not None:
            object.__setattr__(self, "fuse_projections", fuse_siblings)
        if self.use_rslora and self.scaling == LORA:
            object.__setattr__(self, "scaling", RSLORA)
        object.__setattr__(self, "use_rslora", self.use_rslora or self.scaling == RSLORA)
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        for name, (holds, rule) in _rules(self).items():
            if not holds:
                raise ConfigError(f"{name}={short(getattr(self, name))} must be {rule}")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_patterns(name, getattr(self, name) or ())
        _ = self.spec

    @property
    def spec(self) -> MixtureSpec:
        """Return the method with its numbers, as layers take them."""
        named = {each.name: each.name for each in fields(MixtureSpec)} | {"scaling_rule": "scaling"}
        numbers = {name: getattr(self, own) for name, own in named.items()}
        return mixture_spec(**numbers, use_rslora=self.use_rslora, compression_ratio=self.compression_ratio)

    @property
    def narrowing(self) -> Narrowing:
        """Return which matches of target_modules are not adapted."""
        return Narrowing(
            exclude_modules=_as_tuple(self.exclude_modules) or (),
            layers_to_transform=_as_tuple(self.layers_to_transform),
            layers_pattern=_as_tuple(self.layers_pattern) or (),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings outside of `spec` that differ from their defaults, for adapter_config.json."""
        defaults = {each.name: each.default for each in fields(self)}
        found = {key: getattr(self, key) for key in SETTINGS if getattr(self, key) != defaults[key]}
        if self.layers_to_transform is None:
            # Means nothing then, and PEFT refuses a config that has it.
            found.pop("layers_pattern", None)
        return found

    @classmethod
    def from_info(cls, info: AdapterInfo) -> "MaloraConfig":
        """Return the config that an adapter folder was made with, but for the targets, which are those it has."""
        derived = _derived(info.spec, info.settings)
        numbers = {key: value for key, value in asdict(info.spec).items() if key not in derived}
        numbers |= {key: dict(numbers[key]) for key in PATTERNS} | {"scaling": numbers.pop("scaling_rule")}
        return cls(
            **numbers,
            **info.settings,
            target_modules=info.target_modules,
            lora_dropout=info.lora_dropout,
            base_model_name_or_path=info.base_model,
        )

    def to_info(self, target_modules: Sequence[str] = (ALL_LINEAR,)) -> AdapterInfo:
        """Return the info that an adapter folder holds of this config on these linears."""
        return AdapterInfo(
            spec=self.spec,
            target_modules=tuple(target_modules),
            base_model=self.base_model_name_or_path,
            lora_dropout=self.lora_dropout,
            settings=self.settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of adapter_config.json, as plain JSON values."""
        found = adapter_config(self.to_info(_as_tuple(self.target_modules) or (ALL_LINEAR,)))
        found |= {key: list(value) for key, value in found.items() if isinstance(value, tuple)}
        return found if self.target_modules is not None else found | {"target_modules": None}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str | os.PathLike[str] = CONFIG) -> "MaloraConfig":
        """Return the config that `to_dict` or an adapter folder gives. Raises CheckpointError, naming `source`."""
        targets = config.get("target_modules")
        known = dict(config) | ({"target_modules": [ALL_LINEAR]} if targets is None else {})
        found = cls.from_info(info_of(known, Path(source)))
        return found if targets is not None else replace(found, target_modules=None)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> "MaloraConfig":
        """Read adapter_config.json of a folder or hub id. Raises CheckpointError if it is missing or damaged."""
        folder = adapter_folder(folder_or_hub_id, revision)
        return cls.from_dict(read_config(folder), folder / CONFIG)


def _as_tuple(value: Any) -> Any:
    if value is None or isinstance(value, tuple):
        return value
    return (value,) if isinstance(value, str | int) else tuple(value)


def _rules(config: MaloraConfig) -> dict[str, tuple[bool, str]]:
    """Say of each field that `mixture_spec` does not check whether it keeps its rule."""
    layers = _as_tuple(config.layers_to_transform) or ()
    counts = {name: getattr(config, name) for name in ("r", "num_experts", "top_k")}
    return {
        **{name: (type(value) is int and value >= 1, "an integer of at least 1") for name, value in counts.items()},
        "lora_dropout": (0 <= config.lora_dropout < 1, "at least 0 and less than 1"),
        "lora_alpha": (config.lora_alpha > 0, "positive"),
        "beta": (config.beta > 0, "positive"),
        "compression_ratio": (0 < config.compression_ratio <= 1, "above 0 and at most 1"),
        "router_aux_loss_coef": (config.router_aux_loss_coef >= 0, "at least 0"),
        "scaling": (config.scaling in SCALINGS, f"one of {', '.join(SCALINGS)}"),
        "computation": (config.computation in COMPUTATIONS, f"one of {', '.join(COMPUTATIONS)}"),
        "target_modules": (config.target_modules != (), "None or name at least one linear"),
        "layers_to_transform": (all(type(n) is int and n >= 0 for n in layers), "numbers of layers, from 0"),
        "task_type": (config.task_type in ("CAUSAL_LM", None), "CAUSAL_LM or None"),
    }


def _check_patterns(name: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ConfigError(f"{name}={short(list(patterns))} must hold names")
        try:
            number_in_list(pattern) if name == "layers_pattern" else whole_name(pattern)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error


def _derived(spec: MixtureSpec, settings: Mapping[str, Any]) -> set[str]:
    """Return the numbers of a spec that follow from its method and its other numbers."""
    structure, found = spec.structure, set[str]()
    if not structure.routed:
        found |= {"num_experts", "top_k"}
    if structure.dense:
        found.add("top_k")
    numbers = {key: getattr(spec, key) for key in ("num_experts", "top_k", "r")}
    if mixture_spec(spec.method, **numbers, **_only(settings, "compression_ratio")).shared_r == spec.shared_r:
        found.add("shared_r")
    return found


def _only(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: settings[key]} if key in settings else {}
