"""adapter_config.json of an adapter folder, and the names its tensors have in the file.

Keys are `base_model.model.<layer>.<factor>`, the layout of PEFT. A `lora` or `dora` adapter is a stock PEFT one, which
other tools load; the routed methods add a block `malora` to the config and keep their own factor names.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from malora_dist import __version__
from malora_dist.adapters.io.rules import check_config, read_settings, read_spec
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.scaling import LORA, RSLORA
from malora_dist.errors import CheckpointError
from malora_dist.files.json_rules import OBJECT, POSITIVE, check_rule
from malora_dist.files.json_text import parse_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
AnyPath = str | os.PathLike[str]
PREFIX = "base_model.model."
# Version 2 is written where layers have numbers of their own: who knows only version 1 must not take the common ones.
PLAIN_VERSION, FORMAT_VERSION = 1, 2
# PEFT has one expert without the leading dimension.
PEFT_LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}
PATTERNS = ("rank_pattern", "alpha_pattern")
PEFT_NAMES = PEFT_LORA | {"magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter folder says of its tensors.

    trust_remote_code: whether they were trained on a base that was built by its folder's own Python code. settings:
    what a `MaloraConfig` says of training them, where that is not its default.
    """

    spec: MixtureSpec
    target_modules: tuple[str, ...]
    base_model: str
    lora_dropout: float
    trust_remote_code: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def adapter_config(info: AdapterInfo, weights_sha256: str | None = None) -> dict[str, object]:
    """Return the content of adapter_config.json. `weights_sha256` is the checksum of the file of weights beside it."""
    numbers = asdict(info.spec)
    patterns = {key: dict(numbers.pop(key)) for key in PATTERNS}
    scaling, router = numbers.pop("scaling_rule"), _not_default(numbers, ("router_input", "router_dtype"))
    return {
        "peft_type": "LORA" if not info.spec.structure.routed else info.spec.method.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base_model,
        "target_modules": list(info.target_modules),
        "r": info.spec.r,
        "lora_alpha": info.spec.lora_alpha,
        "lora_dropout": info.lora_dropout,
        "use_rslora": info.spec.use_rslora,
        "use_dora": info.spec.structure.magnitude,
        "bias": "none",
        "inference_mode": True,
        # Beside the block, in which readers of this format refuse keys that they do not know.
        "malora_dist_version": __version__,
        **{key: pattern for key, pattern in patterns.items() if pattern},
        **info.settings,
        "malora": {
            "format_version": FORMAT_VERSION if info.spec.has_patterns else PLAIN_VERSION,
            **numbers,
            "use_rslora": info.spec.use_rslora,
            **({} if scaling in (LORA, RSLORA) else {"scaling": scaling}),
            **router,
            **({"trust_remote_code": True} if info.trust_remote_code else {}),
            **_sealed(weights_sha256),
        },
    }


def _not_default(numbers: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Take keys out of a spec's numbers, and return those that are not the default, which files do not hold."""
    defaults = {each.name: each.default for each in fields(MixtureSpec)}
    taken = {key: numbers.pop(key) for key in keys}
    return {key: value for key, value in taken.items() if value != defaults[key]}


def _sealed(weights_sha256: str | None) -> dict[str, str]:
    return {} if weights_sha256 is None else {"weights_sha256": weights_sha256}


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json as an object. Raises CheckpointError if it is missing or damaged."""
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder} is not an adapter folder: {CONFIG}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: it is not a JSON object")
    return config


def read_adapter_info(folder: AnyPath) -> AdapterInfo:
    """Read adapter_config.json. Raises CheckpointError if it is missing, damaged or not from this package."""
    folder = Path(folder)
    return info_of(read_config(folder), folder / CONFIG)


def info_of(config: Mapping[str, Any], path: Path) -> AdapterInfo:
    """Return the info in the content of adapter_config.json; errors name `path`. Raises as `read_adapter_info`."""
    if "malora" not in config:
        if "peft_type" not in config:
            raise CheckpointError(f"{path} is damaged or not written by malora_dist: it has no block `malora`")
        raise CheckpointError(
            f"{path.parent} is an adapter of PEFT, without the block `malora` of this package: convert it with malora "
            f"convert {path.parent} DST --to from-peft"
        )
    check_rule(path, "malora", config["malora"], OBJECT)
    version = config["malora"].get("format_version")
    check_rule(path, "malora.format_version", version, POSITIVE)
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version} is newer than {FORMAT_VERSION}")
    check_config(path, config)
    patterns = {} if version == PLAIN_VERSION else {key: config[key] for key in PATTERNS if key in config}
    return AdapterInfo(
        spec=read_spec(path, config["malora"], patterns),
        target_modules=tuple(config["target_modules"]),
        base_model=config["base_model_name_or_path"],
        lora_dropout=config["lora_dropout"],
        trust_remote_code=config["malora"].get("trust_remote_code", False),
        settings=read_settings(path, config),
    )


def file_key(info: AdapterInfo, name: str) -> str:
    """Return the key in the file of the tensor `<layer>.<factor>`."""
    layer, _, factor = name.rpartition(".")
    return f"{PREFIX}{layer}.{factor if info.spec.structure.routed else PEFT_NAMES[factor]}"


def file_shape(info: AdapterInfo, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in the file: PEFT's LoRA has one expert, without the leading dimension."""
    return shape if info.spec.structure.routed or len(shape) < 3 else shape[1:]


def model_name(key: str) -> tuple[str, bool]:
    """Return `<layer>.<factor>` of a key in the file, and whether the file's tensor lacks the dimension of experts."""
    key = key.removeprefix(PREFIX)
    for factor, peft in PEFT_NAMES.items():
        if key.endswith(f".{peft}"):
            return key.removesuffix(peft) + factor, factor in PEFT_LORA
    return key, False
