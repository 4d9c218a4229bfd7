"""Names of keys: aliases become the one name, unknown names are reported with the nearest known one."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from malora_dist.config.base import Section
from malora_dist.config.problems import Path, Problem, nearest_line
from malora_dist.config.schema import RunConfig


def section_of(model: type[Section], key: str) -> type[Section] | None:
    """Return the section that `key` holds, itself or in a list; None for a leaf."""
    annotation = model.model_fields[key].annotation
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def allows_null(model: type[Section], key: str) -> bool:
    """Return whether null is a value of this key."""
    annotation = model.model_fields[key].annotation
    return isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)


def leaves(model: type[Section] = RunConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every leaf, those of a task under ("data", "tasks")."""
    for key in model.model_fields:
        inner = section_of(model, key)
        if inner is None:
            yield (*path, key)
        else:
            yield from leaves(inner, (*path, key))


def canonical_key(model: type[Section], key: str) -> str | None:
    """Return the section's own name for `key`, or None if it has none."""
    return key if key in model.model_fields else model.aliases.get(key)


def hint(model: type[Section], key: str) -> str:
    """Return the error for an unknown key, with the known one that its writer probably meant."""
    own = difflib.get_close_matches(key, [*model.model_fields, *model.aliases], n=1, cutoff=0.75)
    if own:
        name = canonical_key(model, own[0])
        return f"unknown key; did you mean {name}?"
    elsewhere = _other_section(key)
    if elsewhere is not None:
        return f"unknown key here; did you mean {elsewhere}?"
    loose = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.5)
    guess = f"; the nearest is {loose[0]}" if loose else ""
    return f"unknown key{guess}. Known here: {', '.join(model.model_fields)}"


def _other_section(key: str) -> str | None:
    last = key.split(".")[-1]
    for name in RunConfig.model_fields:
        section = section_of(RunConfig, name)
        own = canonical_key(section, last) if section is not None else None
        if own is not None:
            return f"{name}.{own}"
    close = difflib.get_close_matches(last, [path[-1] for path in leaves()], n=1, cutoff=0.75)
    return ".".join(next(path for path in leaves() if path[-1] == close[0])) if close else None


def canonical(
    data: Mapping[Any, Any], lines: Mapping[Path, int]
) -> tuple[dict[str, Any], dict[Path, int], list[Problem]]:
    """Return `data` with only known names, the lines under those names, and a problem for each name that is wrong."""
    renamer = _Renamer(lines)
    return renamer.section(RunConfig, data, (), ()), renamer.lines, renamer.problems


class _Renamer:
    """Walks a recipe. `path` is a place under the known names, `written` the same place as the file spells it."""

    def __init__(self, file_lines: Mapping[Path, int]) -> None:
        self.file_lines = file_lines
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []

    def section(self, model: type[Section], values: Any, path: Path, written: Path) -> dict[str, Any]:
        if not isinstance(values, Mapping):
            self._report(path, "must be a section of keys", values, written)
            return {}
        clean: dict[str, Any] = {}
        used: dict[str, str] = {}
        for key, value in values.items():
            spelled, place = str(key), (*written, str(key))
            name = canonical_key(model, spelled)
            if name is None:
                self._report((*path, spelled), hint(model, spelled), value, place)
            elif name in used:
                self._report((*path, spelled), _given_twice(name, spelled, used[name]), value, place)
            else:
                used[name] = spelled
                line = nearest_line(place, self.file_lines)
                if line is not None:
                    self.lines[(*path, name)] = line
                inner = section_of(model, name)
                # A section left empty is null in YAML; it has its defaults.
                if inner is None:
                    clean[name] = value
                elif value is not None:
                    clean[name] = self._inner(model, name, inner, value, (*path, name), place)
        return clean

    def _inner(
        self, model: type[Section], name: str, inner: type[Section], value: Any, path: Path, written: Path
    ) -> Any:
        if model.model_fields[name].annotation is inner:
            return self.section(inner, value, path, written)
        if not isinstance(value, list):
            self._report(path, "must be a list, one entry each", value, written)
            return []
        return [self.section(inner, item, (*path, i), (*written, i)) for i, item in enumerate(value)]

    def _report(self, path: Path, rule: str, value: Any, written: Path) -> None:
        self.problems.append(Problem(path, rule, value, nearest_line(written, self.file_lines)))


def _given_twice(name: str, spelled: str, first: str) -> str:
    other = f"is another name of {name}" if spelled != name else f"has another alias, {first}"
    return f"{other}, and {first} is given too; give one of them"
