"""The key `train.lr_ratios` of a recipe: learning rates of parts of the adapter as ratios of the run's."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.config.base import Section


class LearningRateRatios(Section):
    """Learning rates of parts of the adapter, as multiples of `train.learning_rate` (LoRA+, arXiv 2402.12354)."""

    aliases: ClassVar = {"gate": "router", "S_A": "shared_A", "loraplus_lr_ratio": "B"}

    router: float = Field(1.0, gt=0, description="Of the routers.")
    shared_A: float = Field(1.0, gt=0, description="Of the shared down-projection S_A.")  # noqa: N815  # the factor's name
    P: float = Field(1.0, gt=0, description="Of malora's down-projections behind S_A.")
    A: float = Field(1.0, gt=0, description="Of down-projections that read the input (lora, dora, molora).")
    B: float = Field(1.0, gt=0, description="Of the up-projections; LoRA+ has about 16.")

    def by_factor(self) -> dict[str, float]:
        """Return the ratios that are not 1, by the names that adapters have for their factors."""
        ratios = {"gate" if key == "router" else key: getattr(self, key) for key in type(self).model_fields}
        return {factor: ratio for factor, ratio in ratios.items() if ratio != 1}


def ratios_without_meaning(ratios: Mapping[str, float], method: str) -> list[str]:
    """Return the factors that have a ratio and that the method does not have."""
    # Whatever the sizes, a method has the same factors.
    factors = factor_shapes(mixture_spec(method), 1, 1)
    return [factor for factor in ratios if factor not in factors]
