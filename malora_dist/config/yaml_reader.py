"""Read a YAML mapping together with the line of each key. A key given twice is an error."""

import re
from pathlib import Path as FilePath
from typing import Any

import yaml

from malora_dist.config.problems import Path, Problem, raise_all
from malora_dist.errors import ConfigError


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number: YAML 1.1 takes it for text because the dot is missing."""

    yaml_implicit_resolvers = {key: list(values) for key, values in yaml.SafeLoader.yaml_implicit_resolvers.items()}


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_yaml(path: str | FilePath) -> tuple[dict[str, Any], dict[Path, int]]:
    """The mapping in the file, and the line (from 1) of each key by its path.

    Raises ConfigError when the file is missing, is no valid YAML, is no mapping, or holds a key twice.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    loader = _RecipeLoader(text)
    try:
        node = loader.get_single_node()
        lines, twice = _lines_and_duplicates(node)
        data = loader.construct_document(node) if node is not None else {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    raise_all(twice, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold sections (model:, adapter:, data:, ...), not a {type(data).__name__}")
    return data, lines


def parse_value(text: str) -> Any:
    """The value of a command-line override, read as YAML reads it. Raises ConfigError if it is none."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not a YAML value") from error


def _lines_and_duplicates(root: yaml.Node | None) -> tuple[dict[Path, int], list[Problem]]:
    lines: dict[Path, int] = {}
    twice: list[Problem] = []

    def walk(node: yaml.Node, path: Path) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*path, index)] = item.start_mark.line + 1
                walk(item, (*path, index))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key_node, value_node in node.value:
                key, line = str(key_node.value), key_node.start_mark.line + 1
                if key in seen and key != "<<":
                    twice.append(Problem((*path, key), f"is given twice, first on line {seen[key]}", line=line))
                seen.setdefault(key, line)
                lines[(*path, key)] = line
                walk(value_node, (*path, key))

    if root is not None:
        walk(root, ())
    return lines, twice
