"""Notes on a base model, where it and torch are on this machine; a login node may have neither."""

from importlib import import_module
from importlib.util import find_spec

from malora_dist.config import RunConfig
from malora_dist.plan.find_shape import local_config


def family_targets(model: str) -> tuple[str, ...] | None:
    """Return the linears of a model for a new recipe, None if they cannot be found on this machine."""
    if local_config(model) is None or find_spec("torch") is None:
        return None
    targets: tuple[str, ...] | None = import_module("malora_dist.training.base_support").family_targets(model)
    return targets


def base_notes(config: RunConfig) -> tuple[str, ...]:
    """Return notes on the recipe's model. Raises ConfigError if it cannot be trained on."""
    name = config.model.name_or_path
    if local_config(name, config.model.revision) is None:
        return (f"{name} is not on this machine: adapter.target_modules was not checked against it",)
    if find_spec("torch") is None:
        return (f"torch is not on this machine: {name} was not checked against adapter.target_modules",)
    notes: tuple[str, ...] = import_module("malora_dist.training.base_support").check_local_support(config)
    return notes
