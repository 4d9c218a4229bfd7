"""All optimizers by name. A new one is a row here."""

from malora_dist.errors import ConfigError, short
from malora_dist.optimizers.adafactor import ADAFACTOR
from malora_dist.optimizers.adamw import ADAMW
from malora_dist.optimizers.adamw_8bit import ADAMW_8BIT
from malora_dist.optimizers.spec import OptimizerSpec

OPTIMIZERS: dict[str, OptimizerSpec] = {spec.name: spec for spec in (ADAMW, ADAMW_8BIT, ADAFACTOR)}
DEFAULT = ADAMW.name


def optimizer_spec(name: str) -> OptimizerSpec:
    """Return the optimizer of this name or alias. Raises ConfigError if there is none."""
    for spec in OPTIMIZERS.values():
        if name in (spec.name, *spec.aliases):
            return spec
    raise ConfigError(f"train.optim={short(name)} must be one of {', '.join(OPTIMIZERS)}")


def spec_of_kind(kind: object) -> OptimizerSpec | None:
    """Return the optimizer that checkpoints call `kind`, None if this version knows none."""
    return next((spec for spec in OPTIMIZERS.values() if spec.kind == kind), None)


def choices_text() -> str:
    """Return all names with what each is, for the recipe's reference."""
    return "; ".join(f"{spec.name}: {spec.description}" for spec in OPTIMIZERS.values())
