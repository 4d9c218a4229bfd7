"""Everything that is wrong with a recipe, collected and shown at once."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from malora_dist.config.base import RULE_ERROR, Rule
from malora_dist.errors import ConfigError, brief, short

Path = tuple[str | int, ...]
# None: a key that the command line set.
Lines = Mapping[Path, int | None]
NO_VALUE = object()


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, the value found there, the rule it breaks, the line of the file."""

    path: Path
    rule: str
    value: Any = NO_VALUE
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        value = "" if self.value is NO_VALUE else f"={short(self.value)}"
        return f"{where}{brief(dotted(self.path))}{value}: {self.rule}"


def dotted(path: Path) -> str:
    """Join a path with dots: `data.tasks[0].name` for ("data", "tasks", 0, "name")."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def raise_all(problems: Iterable[Problem], source: str) -> None:
    """Raise one ConfigError that lists every problem in the order of the file; nothing if there is none."""
    found = sorted(problems, key=lambda problem: problem.line if problem.line is not None else 10**9)
    if not found:
        return
    if len(found) == 1:
        raise ConfigError(f"{source}: {found[0]}")
    lines = "\n".join(f"  {problem}" for problem in found)
    raise ConfigError(f"{source} has {len(found)} errors:\n{lines}")


def from_pydantic(error: ValidationError, data: Any, lines: Lines) -> list[Problem]:
    """Return the problems of one pydantic pass over `data`."""
    problems: dict[Path, Problem] = {}
    for item in error.errors(include_url=False):
        if item["type"] == RULE_ERROR:
            for rule in item["ctx"]["broken"]:
                problem = _rule_problem(rule, item["loc"], item["input"], lines)
                problems[(*problem.path, rule.text)] = problem
        else:
            path = _known_path(item["loc"], data)
            missing = item["type"] == "missing"
            value = NO_VALUE if missing else item["input"]
            rule_text = "is required" if missing else _plain(item["msg"])
            problems.setdefault(path, Problem(path, rule_text, value, nearest_line(path, lines)))
    return list(problems.values())


def rule_keys(error: ValidationError) -> dict[Path, set[Path]]:
    """Map each broken rule's problem path and text to the paths of all keys that the rule reads."""
    keys: dict[Path, set[Path]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == RULE_ERROR:
            for rule in item["ctx"]["broken"]:
                keys[(*item["loc"], rule.keys[0], rule.text)] = {(*item["loc"], key) for key in rule.keys}
    return keys


def nearest_line(path: Path, lines: Lines) -> int | None:
    """Return the line of the key, or of the nearest section around it that the file holds."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def _rule_problem(rule: Rule, location: Path, values: Any, lines: Lines) -> Problem:
    path = (*location, rule.keys[0])
    value = values.get(rule.keys[0], NO_VALUE) if isinstance(values, Mapping) else NO_VALUE
    return Problem(path, rule.text, value, nearest_line(path, lines))


def _known_path(location: Path, data: Any) -> Path:
    """Return the part of a path that the recipe holds, plus one missing key: pydantic adds the union's members."""
    path: list[str | int] = []
    for part in location:
        inside = (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and isinstance(part, int))
        path.append(part)
        if not inside:
            if not isinstance(data, Mapping):
                path.pop()
            break
        data = data[part]
    return tuple(path)


def _plain(message: str) -> str:
    message = re.sub(r"^Input should be", "must be", message)
    message = re.sub(r"^\w+ should have at least 1 (item|character).*", "must not be empty", message)
    return message[:1].lower() + message[1:]
