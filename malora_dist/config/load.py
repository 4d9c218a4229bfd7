"""From a recipe file and overrides to a checked RunConfig, and back to a file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import ValidationError

from malora_dist.config.base import Section
from malora_dist.config.names import canonical
from malora_dist.config.overrides import apply_overrides, parse_overrides
from malora_dist.config.problems import Lines, Path, Problem, from_pydantic, raise_all, rule_keys
from malora_dist.config.schema import RunConfig
from malora_dist.config.yaml_reader import RecipeDumper, read_yaml


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply overrides such as ["--adapter.r", "16"], check it.

    Raises one ConfigError with every problem found: its line, key, value and the rule it breaks.
    """
    data, lines = read_yaml(path)
    return config_from_dict(data, overrides, source=str(path), lines=lines)


def config_from_dict(
    data: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "the configuration",
    lines: Mapping[Path, int] | None = None,
) -> RunConfig:
    """Apply overrides to a nested mapping of sections and keys, and check it, as `load_config` does."""
    pairs = parse_overrides(overrides)
    clean, known_lines, problems = canonical(data, lines or {})
    wrong = {problem.path for problem in problems}
    changed, override_problems = apply_overrides(clean, pairs)
    problems += override_problems
    all_lines = {**known_lines, **dict.fromkeys(changed)}
    config, found = _validate(clean, all_lines, wrong)
    reported = {problem.path for problem in problems}
    raise_all([*problems, *(problem for problem in found if problem.path not in reported)], source)
    assert config is not None
    return config


def config_text(config: RunConfig) -> str:
    """Return every key with its value as YAML; loading it gives an equal config. Keys without meaning are left out."""
    text: str = yaml.dump(plain_config(config), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def plain_config(value: Any) -> Any:
    """Return a config, or a part of one, as nested mappings and lists; keys without meaning are left out."""
    if isinstance(value, Section):
        skipped = value.inapplicable_fields()
        return {key: plain_config(getattr(value, key)) for key in type(value).model_fields if key not in skipped}
    return [plain_config(item) for item in value] if isinstance(value, tuple) else value


def _validate(data: dict[str, Any], lines: Lines, wrong: set[Path]) -> tuple[RunConfig | None, list[Problem]]:
    """Validate; then again without the keys that failed, because pydantic checks rules between keys only after them.

    A rule that reads a failed key (or one in `wrong`) says nothing and is left out of the second pass.
    """
    try:
        return RunConfig.model_validate(data), []
    except ValidationError as error:
        problems = from_pydantic(error, data, lines)
        failed = {problem.path for problem in problems} - set(_rule_paths(error))
        if not failed:
            return None, problems
    try:
        RunConfig.model_validate(_without(data, (), failed))
    except ValidationError as error:
        reads = rule_keys(error)
        known = {(problem.path, problem.rule) for problem in problems}
        for problem in from_pydantic(error, data, lines):
            keys = reads.get((*problem.path, problem.rule))
            if keys is not None and not keys & (failed | wrong) and (problem.path, problem.rule) not in known:
                problems.append(problem)
    return None, problems


def _rule_paths(error: ValidationError) -> Iterable[Path]:
    return (path[:-1] for path in rule_keys(error))


def _without(value: Any, path: Path, failed: set[Path]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, (*path, key), failed) for key, item in value.items() if (*path, key) not in failed}
    if isinstance(value, list):
        return [_without(item, (*path, i), failed) for i, item in enumerate(value)]
    return value
