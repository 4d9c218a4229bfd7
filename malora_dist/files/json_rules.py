"""What each key of manifest.json must be."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from malora_dist.errors import CheckpointError, brief, short

Rule = tuple[str, Callable[[Any], bool]]

TEXT: Rule = ("must be a string", lambda value: isinstance(value, str))
TEXT_OR_NULL: Rule = ("must be a string or null", lambda value: value is None or isinstance(value, str))
COUNT: Rule = ("must be an integer of at least 0", lambda value: type(value) is int and value >= 0)
POSITIVE: Rule = ("must be an integer of at least 1", lambda value: type(value) is int and value >= 1)
OBJECT: Rule = ("must be an object", lambda value: isinstance(value, dict))
DIGEST: Rule = (
    "must be 64 lower-case hex digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)

DOCUMENT: dict[str, Rule] = {
    "format_version": POSITIVE,
    "malora_dist": TEXT,
    "torch": TEXT,
    "deepspeed": TEXT,
    "transformers": TEXT,
    "step": COUNT,
    "topology": OBJECT,
    "config": OBJECT,
    "base": OBJECT,
    "state": OBJECT,
    "files": OBJECT,
    "tensors": OBJECT,
}
TOPOLOGY: dict[str, Rule] = {"world_size": POSITIVE, "ep_size": POSITIVE, "zero_stage": COUNT}
BASE: dict[str, Rule] = {"name": TEXT, "revision": TEXT_OR_NULL, "fingerprint": TEXT, "dtype": TEXT}
FILE: dict[str, Rule] = {"bytes": COUNT, "sha256": DIGEST}
TENSORS: dict[str, Rule] = {"adapter": OBJECT, "optimizer": OBJECT, "rng": OBJECT}
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


def check_document(path: Path, document: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming file, key, value and rule, unless the parsed manifest keeps every rule."""
    _check_keys(path, "", document, DOCUMENT)
    _check_keys(path, "topology", document["topology"], TOPOLOGY)
    _check_keys(path, "base", document["base"], BASE)
    for name, record in document["files"].items():
        if not PLAIN_NAME.fullmatch(name) or name == path.name:
            raise CheckpointError(f"{path}: files has {short(name)}, must be the plain name of another file")
        check_rule(path, f"files[{short(name)}]", record, OBJECT)
        _check_keys(path, f"files[{short(name)}]", record, FILE)
    _check_keys(path, "tensors", document["tensors"], TENSORS)
    for kind, file_of in document["tensors"].items():
        for name, file in file_of.items():
            if not isinstance(file, str) or file not in document["files"]:
                raise CheckpointError(f"{path}: tensors.{kind}[{short(name)}]={short(file)} must be one of `files`")


def _check_keys(path: Path, where: str, value: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    prefix = f"{where}." if where else ""
    for key in value.keys() - rules.keys():
        raise CheckpointError(f"{path}: {prefix}{brief(key)} is not a key of this format; those are {', '.join(rules)}")
    for key, rule in rules.items():
        if key not in value:
            raise CheckpointError(f"{path}: {prefix}{key} is missing; it {rule[0]}")
        check_rule(path, f"{prefix}{key}", value[key], rule)


def check_rule(path: Path, key: str, value: Any, rule: Rule) -> None:
    """Raise CheckpointError, naming file, key, value and rule, unless the value keeps the rule."""
    text, holds = rule
    if not holds(value):
        raise CheckpointError(f"{path}: {key}={short(value)} {text}")
