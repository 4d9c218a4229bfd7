"""Settings given on the command line: `--adapter.r 16`, `--adapter.r=16`, `adapter.r=16`."""

from collections.abc import Sequence
from typing import Any

from malora_dist.config.base import Section
from malora_dist.config.names import allows_null, canonical_key, hint, section_of
from malora_dist.config.problems import Path, Problem, dotted
from malora_dist.config.schema import RunConfig
from malora_dist.config.yaml_reader import parse_value
from malora_dist.errors import ConfigError, brief, short

# What --new-run is short for.
NEW_RUN = "--train.resume_from_checkpoint=null"


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split a process's arguments into the recipe and the overrides, without the --local_rank a launcher adds.

    `--new-run` is short for train.resume_from_checkpoint=null. Raises ConfigError if the recipe is missing.
    """
    given = list(arguments)
    if given and given[0].startswith("--local_rank="):
        given = given[1:]
    if not given or given[0].startswith("-"):
        raise ConfigError("the recipe must come first: RECIPE.yaml [--section.key value ...]")
    return given[0], [NEW_RUN if part == "--new-run" else part for part in given[1:]]


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (dotted key, value) of each override, in order; values are read as YAML.

    Raises ConfigError for an argument that is no override, or for a key without a value.
    """
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--"):
                raise ConfigError(
                    f"{short(argument)} is not an override; write --section.key value or section.key=value"
                )
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{brief(argument)} needs a value: {brief(argument)} VALUE")
            text = rest.pop(0)
        if "." not in key and key not in RunConfig.model_fields:
            raise ConfigError(f"--{brief(key)}: {hint(RunConfig, key)} Overrides are written --section.key value")
        pairs.append((key, parse_value(text, key)))
    return pairs


def apply_overrides(data: dict[str, Any], pairs: Sequence[tuple[str, Any]]) -> tuple[set[Path], list[Problem]]:
    """Set each value in `data` (names canonical, changed in place). Returns the paths set, and the problems.

    For a key that does not allow null, null removes the file's value, so that the default applies.
    """
    changed: set[Path] = set()
    problems: list[Problem] = []
    for key, value in pairs:
        found = _set(data, key.split("."), value)
        if isinstance(found, str):
            problems.append(Problem((key,), found, value))
        else:
            changed.add(found)
    return changed, problems


def _set(data: dict[str, Any], parts: list[str], value: Any) -> Path | str:
    """Walk down to the key and set it; return its path, or the rule that the key breaks."""
    model: type[Section] = RunConfig
    target: Any = data
    path: Path = ()
    while True:
        name = canonical_key(model, parts[0])
        if name is None:
            return hint(model, parts[0])
        path, inner, rest = (*path, name), section_of(model, name), parts[1:]
        if inner is None or not rest:
            break
        target, model = target.setdefault(name, {}), inner
        if isinstance(target, list):
            index = _task_index(target, rest[0])
            if index is None or len(rest) < 2:
                names = ", ".join(map(_task_name, target))
                return f"name a task and its key: {'.'.join(map(str, path))}.TASK.KEY; the tasks are {names}"
            target, path, rest = target[index], (*path, index), rest[1:]
        if not isinstance(target, dict):
            return f"{dotted(path)} is {short(target)}, which has no keys"
        parts = rest
    if rest:
        return f"{name} is a single value, it has no {'.'.join(rest)}"
    if inner is not None and not isinstance(value, list):
        return f"is a section; set one of its keys: {', '.join(inner.model_fields)}"
    if value is None and not allows_null(model, name):
        target.pop(name, None)
    else:
        target[name] = value
    return path


def _task_index(tasks: list[Any], name: str) -> int | None:
    if name.isascii() and name.isdigit() and int(name[:9]) < len(tasks):
        return int(name)
    return next((index for index, name_ in enumerate(map(_task_name, tasks)) if name_ == name), None)


def _task_name(task: Any) -> str:
    return str(task.get("name")) if isinstance(task, dict) else ""
