"""What can go wrong, by kind. Every message names the key, the value and the rule that was broken."""


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
