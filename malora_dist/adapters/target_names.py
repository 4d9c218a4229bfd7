"""What a target of adapters says of names alone; needs no torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from malora_dist.errors import ConfigError, short

ALL_LINEAR = "all-linear"
# What recipes and the library adapt where nothing else is said.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
# Linears of one parent module that read the same tensor, and the name of that tensor's readers.
READERS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
# Names of modules have none of these.
_NO_NAME = re.compile(r"[^\w.\-]")
# Of a layer in the first list that its name tells of.
FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")
LONGEST_PATTERN, LONGEST_SECONDS = 2000, 1.0


def is_pattern(target: str) -> bool:
    """Return whether a target is a regular expression for whole names rather than the end of a name.

    >>> [is_pattern(target) for target in ("q_proj", "mlp.up_proj", "all-linear", r".*mlp.*")]
    [False, False, False, True]
    """
    return target != ALL_LINEAR and _NO_NAME.search(target) is not None


def name_matches(target: str, name: str) -> bool:
    """Return whether a target means the module of this whole name, if that is a linear.

    Raises ValueError as `compiled`, ConfigError as `NamePattern`.

    >>> [name_matches(target, "layers.0.mlp.up_proj") for target in ("up_proj", "proj", r".*\\.up_proj", "all-linear")]
    [True, False, True, True]
    """
    if target == ALL_LINEAR:
        return True
    if is_pattern(target):
        return compiled(target).fullmatch(name) is not None
    return name == target or name.endswith(f".{target}")


@dataclass(frozen=True)
class NamePattern:
    """A regular expression that anybody may have written, and that is given a moment for each name.

    Raises ConfigError for one that tries more and more ways to match a name.
    """

    expression: Any

    def fullmatch(self, name: str) -> Any:
        """Return the match of a whole name, or None."""
        return self._in_time(self.expression.fullmatch, name)

    def match(self, name: str) -> Any:
        """Return the match of the beginning of a name, or None."""
        return self._in_time(self.expression.match, name)

    def _in_time(self, find: Callable[..., Any], name: str) -> Any:
        try:
            return find(name, timeout=LONGEST_SECONDS)
        except TimeoutError as error:
            raise ConfigError(
                f"the pattern {short(self.expression.pattern)} takes more than {LONGEST_SECONDS:g} s for the name "
                f"{name!r}: there are too many ways to match it; repeat nothing that is repeated itself"
            ) from error


def compiled(pattern: str, form: str = "{}") -> NamePattern:
    """Compile a pattern that anybody may have written. Raises ValueError, saying why, if it is no regular expression.

    `form` is the text around the pattern, which takes the place of `{}`.

    >>> compiled("a(")
    Traceback (most recent call last):
    ...
    ValueError: missing ), unterminated subpattern at position 1
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST_PATTERN}")
    import regex

    try:
        # What a pattern means is told by `re`; the other one can be stopped.
        return NamePattern(regex.compile(re.compile(form.format(pattern)).pattern))
    except (re.error, regex.error, OverflowError) as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_excluded(exclude_modules: Sequence[str], name: str) -> bool:
    """Return whether a name or its end, from a dot on, is excluded, or a pattern for whole names matches it.

    >>> [is_excluded(["lm_head", "0.mlp.up_proj"], name) for name in ("lm_head", "h.0.mlp.up_proj", "h.1.mlp.up_proj")]
    [True, True, False]
    """
    return any(name_matches(excluded, name) for excluded in exclude_modules)


def in_layers(layers: Sequence[int], layers_pattern: Sequence[str], name: str) -> bool:
    """Return whether a module is in one of the numbered layers, as PEFT's `layers_to_transform` means them.

    `layers_pattern` are names of the list of layers; without one, the first number of a name is that of its layer.

    >>> [in_layers([1], (), name) for name in ("model.layers.1.mlp.experts.0.w1", "model.layers.0.mlp.w1", "lm_head")]
    [True, False, False]
    >>> in_layers([0], ["h"], "transformer.blocks.3.h.0.fc")
    True
    """
    patterns: list[Any] = [number_in_list(pattern) for pattern in layers_pattern] or [FIRST_NUMBER]
    found = next((match for match in (pattern.match(name) for pattern in patterns) if match), None)
    return found is not None and int(found["number"]) in layers


def whole_name(pattern: str) -> NamePattern:
    """Return what matches the names that the pattern matches whole. Raises ValueError if it is none."""
    return _named(pattern, "{}")


def number_in_list(pattern: str) -> NamePattern:
    """Return what finds a layer's number in the list whose name the pattern is. Raises ValueError if it is none."""
    return _named(pattern, r"(?:^|.*?\.){}\.(?P<number>\d+)\.")


def end_of_name(pattern: str) -> NamePattern:
    """Return what matches names whose end, from a dot on, the pattern is. Raises ValueError if it is none."""
    return _named(pattern, r"(.*\.)?({})$")


def _named(pattern: str, form: str) -> NamePattern:
    try:
        return compiled(pattern, form)
    except ValueError as error:
        raise ValueError(f"{short(pattern)} is not a valid regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """What of the targets' matches is left out, by PEFT's arguments of these names."""

    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Return whether a module that a target matches is adapted."""
        layers = self.layers_to_transform
        return not is_excluded(self.exclude_modules, name) and (
            layers is None or in_layers(layers, self.layers_pattern, name)
        )

    def __str__(self) -> str:
        given = {key: value for key, value in vars(self).items() if value or key == "layers_to_transform"}
        return ", ".join(f"{key}={value if value is None else list(value)}" for key, value in given.items())


EVERYTHING = Narrowing()


def pattern_value(patterns: Sequence[tuple[str, float]], name: str, default: float) -> float:
    r"""Return the value of the first pattern that is the end of a module's name from a dot on, as PEFT searches them.

    Raises ValueError, naming the pattern, if it is no regular expression.

    >>> pattern_value([("q_proj", 4), (r"layers\.0\.mlp\..*", 2)], "model.layers.0.mlp.up_proj", 8)
    2
    """
    for pattern, value in patterns:
        if end_of_name(pattern).match(name):
            return value
    return default
