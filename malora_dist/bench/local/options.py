"""Words of the command line made values, and back. Needs no torch."""

import re
import shlex
from dataclasses import fields
from typing import Any

from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.config.dtypes import SHORT_NAMES, dtype_rule, long_name
from malora_dist.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float64")
BASES = ("full", "nf4")


def sizes(text: str) -> list[tuple[int, int]]:
    """Parse `576,4096x11008` to the (in_features, out_features) of linears; one number is both. Raises ConfigError."""
    parts = [re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", part.strip()) for part in text.split(",")]
    if None in parts:
        raise ConfigError(f"--size {text!r} must be a list such as 576,4096x11008: inputs x outputs, or one for both")
    return [(int(part[1]), int(part[2] or part[1])) for part in parts if part]


def whole_numbers(option: str, text: str) -> list[int]:
    """Parse a list such as `512,8192`. Raises ConfigError unless all are whole numbers above 0."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} {text!r} must be a list of whole numbers above 0, such as 512,8192")
    return [int(part) for part in parts]


def labelled_share(text: str) -> float:
    """Parse `all`, or a share of a row's tokens above 0 and up to 1. Raises ConfigError."""
    try:
        share = 1.0 if text == "all" else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--labels {text!r} must be all, or the share of tokens that are learned, such as 0.25")
    return share


def default_names(dtype: str) -> list[str]:
    """Return the names of all baselines, without duplicates: only from bf16 does PEFT raise adapters to fp32."""
    return [name for name, baseline in BASELINES.items() if dtype == "bf16" or not baseline.fp32]


def names_on_one_linear(dtype: str) -> list[str]:
    """Return `default_names` without those that differ only where several linears read one tensor."""
    return [name for name in default_names(dtype) if not BASELINES[name].fuse_projections]


def one_of(option: str, value: str, known: Any) -> str:
    """Return the value, if it is known. Raises ConfigError."""
    if value not in known:
        raise ConfigError(f"{option} {value!r} must be one of {', '.join(known)}")
    return value


def short_dtype(given: str) -> str:
    """Return the short name of a dtype that --dtype may give by any name. Raises ConfigError if it is not measured."""
    name = long_name(given)
    if name not in DTYPES:
        raise ConfigError(f"--dtype {given!r} {dtype_rule(DTYPES)}")
    return SHORT_NAMES[name]


def command_line(verb: str, options: Any) -> str:
    """Return the command to run it again: `malora bench VERB` with every option that differs from its default."""
    words = ["malora", "bench", verb]
    for option in fields(options):
        value = getattr(options, option.name)
        if value is not None and value != option.default:
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join(words)
