"""What adapter_config.json of our own adapters must say."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from malora_dist.adapters.methods import ROUTER_DTYPES, ROUTER_INPUTS, MixtureSpec, mixture_spec, unknown_method
from malora_dist.adapters.scaling import SCALINGS
from malora_dist.errors import CheckpointError, ConfigError, brief, short
from malora_dist.files.json_rules import DIGEST, OBJECT, POSITIVE, TEXT, Rule, check_rule


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def _one_of(names: Iterable[str]) -> Rule:
    known = tuple(names)
    return f"must be one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known


TRUTH: Rule = ("must be true or false", lambda value: isinstance(value, bool))
FACTOR: Rule = ("must be a positive number", lambda value: _is_number(value) and value > 0)
SHARE: Rule = ("must be a number of at least 0 and less than 1", lambda value: _is_number(value) and 0 <= value < 1)
NAMES: Rule = ("must be a list of names of modules", _is_names)
RANK: Rule = ("must be an integer of at least 1, or null", lambda value: value is None or POSITIVE[1](value))

DOCUMENT: dict[str, Rule] = {
    "malora": OBJECT,
    "target_modules": NAMES,
    "base_model_name_or_path": TEXT,
    "lora_dropout": SHARE,
}
BLOCK: dict[str, Rule] = {
    "method": TEXT,
    "num_experts": POSITIVE,
    "top_k": POSITIVE,
    "r": POSITIVE,
    "shared_r": RANK,
    "lora_alpha": FACTOR,
    "beta": FACTOR,
    "normalize_gates": TRUTH,
    "use_rslora": TRUTH,
}
# What a MaloraConfig says besides, at the top; PEFT's names where it has one.
SETTINGS: dict[str, Rule] = {
    "router_aux_loss_coef": ("must be a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "compression_ratio": (
        "must be a number above 0 and at most 1",
        lambda value: _is_number(value) and 0 < value <= 1,
    ),
    "exclude_modules": NAMES,
    "layers_to_transform": (
        "must be a list of numbers of layers",
        lambda value: isinstance(value, list) and all(type(item) is int and item >= 0 for item in value),
    ),
    "layers_pattern": NAMES,
    "computation": TEXT,
    "fuse_projections": TRUTH,
    "seed": ("must be an integer", lambda value: type(value) is int),
}
# What PEFT reads of the same, at the top.
TWICE = ("r", "lora_alpha", "use_rslora")
OPTIONAL: dict[str, Rule] = {
    "use_rslora": TRUTH,
    "scaling": _one_of(SCALINGS),
    "router_input": _one_of(ROUTER_INPUTS),
    "router_dtype": _one_of(ROUTER_DTYPES),
    "trust_remote_code": TRUTH,
    "weights_sha256": DIGEST,
}
# Keys of the block that `MixtureSpec` has under another name.
SPEC_NAMES = {"scaling": "scaling_rule"}


def _method_rule() -> Rule:
    """Return the rule of today's methods: more may be registered at any time."""
    return str(unknown_method(None)), lambda value: unknown_method(value) is None


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming file, key, value and rule, unless the keys that are read keep every rule."""
    for key, rule in DOCUMENT.items():
        if key not in config:
            raise CheckpointError(f"{path}: {key} is missing; it {rule[0]}")
        check_rule(path, key, config[key], rule)
    block = config["malora"]
    for key in block.keys() - {"format_version", *BLOCK, *OPTIONAL}:
        # Who has written it meant something by it.
        raise CheckpointError(f"{path}: malora.{brief(key)} is not a key of this format")
    for key, rule in {**BLOCK, **OPTIONAL, "method": _method_rule()}.items():
        if key in block:
            check_rule(path, f"malora.{key}", block[key], rule)
        elif key not in OPTIONAL:
            raise CheckpointError(f"{path}: malora.{key} is missing; it {rule[0]}")
    for key in TWICE:
        if key in config and config[key] != block.get(key, False):
            raise CheckpointError(f"{path}: {key}={short(config[key])} must be malora.{key}={block.get(key, False)!r}")


def read_settings(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the file gives, lists as tuples. Raises CheckpointError for one that breaks its rule."""
    given = {key: config[key] for key in SETTINGS if config.get(key) is not None}
    for key, value in given.items():
        check_rule(path, key, value, SETTINGS[key])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def read_spec(path: Path, block: Mapping[str, Any], patterns: Mapping[str, Any]) -> MixtureSpec:
    """Read the mixture of the block `malora`. Raises CheckpointError if no recipe could give it its numbers."""
    for key, value in patterns.items():
        check_rule(path, key, value, OBJECT)
    named = {SPEC_NAMES.get(key, key): value for key, value in block.items()}
    own = (*(field.name for field in fields(MixtureSpec)), "use_rslora")
    numbers = {name: named[name] for name in own if name in named}
    try:
        wanted = mixture_spec(**numbers, **patterns)
    except ConfigError as error:
        raise CheckpointError(f"{path}: malora: {error}") from error
    for name, value in numbers.items():
        only = getattr(wanted, name)
        if value != only:
            raise CheckpointError(f"{path}: malora.{name}={value!r} must be {only!r} for {wanted.method}")
    return wanted
