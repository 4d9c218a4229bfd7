"""What can go wrong, by kind. Every message names the key, the value and the rule that was broken."""

from importlib.util import find_spec
from reprlib import Repr
from typing import Any


class MaloraError(Exception):
    """Base of every error this package raises for a person to read."""


class ConfigError(MaloraError):
    """A recipe, an override or a flag is wrong."""


class TopologyError(MaloraError):
    """The number of processes and the parallel plan do not fit together."""


class CheckpointError(MaloraError):
    """An adapter folder or checkpoint is missing, damaged or of another model."""


class DataError(MaloraError):
    """A task's file or a row of it is wrong."""


class TrainingError(MaloraError):
    """A run had to stop: a loss or a gradient is not finite, or a peer failed."""


class NonFiniteError(TrainingError):
    """A loss or a gradient is not finite. Raised by every process of a run alike."""


def require_package(package: str, extra: str, purpose: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: Name of the package as it is imported and installed.
        extra: The extra of malora_dist that installs it.
        purpose: What needs it, the beginning of the message.

    Raises:
        ConfigError: The package is not installed; the message says how to install it.
    """
    try:
        missing = find_spec(package) is None
    except ModuleNotFoundError:  # of the package that it is in
        missing = True
    if missing:
        raise ConfigError(f'{purpose} needs the package {package}: pip install "malora_dist[{extra}]"')


def brief(key: str) -> str:
    """A key as it is, of a long one the beginning."""
    return key if len(key) <= 120 else f"{key[:117]}..."


def short(value: Any, characters: int = 80) -> str:
    """The value as Python writes it, of a long one the beginning; it may be nested deeper than `repr` can go."""
    shortened = Repr()
    for kind in ("string", "other", "long"):
        # The end that Repr keeps of these is cut away here.
        setattr(shortened, f"max{kind}", 3 * characters)
    for kind in ("dict", "list", "tuple", "set", "frozenset", "deque", "array"):
        setattr(shortened, f"max{kind}", characters)
    text = shortened.repr(value)
    return text if len(text) <= characters else f"{text[: characters - 3]}..."
