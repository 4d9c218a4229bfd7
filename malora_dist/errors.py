"""What can go wrong, by kind. Every message names the key, the value and the rule that was broken."""

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


def brief(key: str) -> str:
    """A key as it is, of a long one the beginning."""
    return key if len(key) <= 120 else f"{key[:117]}..."


def short(value: Any) -> str:
    """The value as Python writes it, of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
