"""Rotary embeddings whose frequencies depend on how long the longest text of a row is."""

from typing import Any

from malora_dist.errors import ConfigError

LONGROPE, DYNAMIC = "longrope", "dynamic"


def length_limits(config: Any) -> dict[str, int]:
    """Return, by kind, the tokens up to which a model's rotations do not depend on a text's length; most have none."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    sets = (
        [parameters] if "rope_type" in parameters else [each for each in parameters.values() if isinstance(each, dict)]
    )
    whole = getattr(text, "max_position_embeddings", 0)
    limits: dict[str, int] = {}
    for each in sets:
        if (kind := each.get("rope_type")) in (LONGROPE, DYNAMIC):
            own = each.get("original_max_position_embeddings") if kind == LONGROPE else None
            limits[kind] = min(own or whole, limits.get(kind, own or whole))
    return limits


def check_rotations(config: Any, longest: int) -> None:
    """Raise ConfigError if texts of `longest` tokens would change how the model computes those after them."""
    limit = length_limits(config).get(DYNAMIC, longest)
    if longest > limit:
        raise ConfigError(
            f"samples of {longest} tokens are too long for this {config.model_type}: beyond {limit} its rotary "
            "embedding (dynamic) changes with the longest sample seen so far, so its losses cannot be reproduced; set "
            f"data.max_seq_length={limit}"
        )
