"""adapter_config.json of an adapter folder, and the names its tensors have in the file.

Keys are `base_model.model.<layer>.<factor>`, the layout of PEFT. A `lora` or `dora` adapter is a stock PEFT one, which
other tools load; the routed methods add a block `malora` to the config and keep their own factor names.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from malora_dist.errors import CheckpointError
from malora_dist.methods import METHODS, MixtureSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FORMAT_VERSION = 1
# PEFT has one expert without the leading dimension.
PEFT_LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}
PEFT_NAMES = PEFT_LORA | {"magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter folder says of its tensors. trust_remote_code: whether code of the base's folder made them."""

    spec: MixtureSpec
    target_modules: tuple[str, ...]
    base_model: str
    lora_dropout: float
    trust_remote_code: bool = False


def adapter_config(info: AdapterInfo) -> dict[str, object]:
    """The content of adapter_config.json."""
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
        "malora": {
            "format_version": FORMAT_VERSION,
            **asdict(info.spec),
            **({"trust_remote_code": True} if info.trust_remote_code else {}),
        },
    }


def read_adapter_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """Read adapter_config.json. Raises CheckpointError if it is missing, damaged or not from this package."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        if "peft_type" in config and "malora" not in config:
            raise CheckpointError(
                f"{folder} is an adapter of PEFT, without the block `malora` of this package: "
                f"malora convert {folder} DST --to from-peft makes one of ours of it"
            )
        block = dict(config["malora"])
        version, trusted = block.pop("format_version"), block.pop("trust_remote_code", False) is True
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{folder / CONFIG}: format_version {version} is newer than {FORMAT_VERSION}")
        if block["method"] not in METHODS:
            raise CheckpointError(f"{folder / CONFIG}: method {block['method']!r} is not one of {', '.join(METHODS)}")
        return AdapterInfo(
            spec=MixtureSpec(**block),
            target_modules=tuple(config["target_modules"]),
            base_model=config["base_model_name_or_path"],
            lora_dropout=config["lora_dropout"],
            trust_remote_code=trusted,
        )
    except OSError as error:
        raise CheckpointError(f"{folder} is not an adapter folder: {CONFIG}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged or not written by malora_dist: {error!r}") from error


def file_key(info: AdapterInfo, name: str) -> str:
    """The key in the file of the tensor `<layer>.<factor>`."""
    layer, _, factor = name.rpartition(".")
    return f"{PREFIX}{layer}.{factor if info.spec.structure.routed else PEFT_NAMES[factor]}"


def file_shape(info: AdapterInfo, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: PEFT's LoRA has one expert, without the leading dimension."""
    return shape if info.spec.structure.routed or len(shape) < 3 else shape[1:]


def model_name(key: str) -> tuple[str, bool]:
    """`<layer>.<factor>` of a key in the file, and whether the file's tensor lacks the dimension of experts."""
    key = key.removeprefix(PREFIX)
    for factor, peft in PEFT_NAMES.items():
        if key.endswith(f".{peft}"):
            return key.removesuffix(peft) + factor, factor in PEFT_LORA
    return key, False
