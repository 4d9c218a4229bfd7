"""Up to which length a base's rotations do not depend on it. That they do beyond is in test_packing.py."""

from malora_dist.models.rotations import length_limits
from tests.evaluation.test_packing import DYNAMIC, LONGROPE
from tests.families import family_config


def test_limits_are_those_of_the_kinds_that_depend_on_length() -> None:
    """Of dynamic ones the positions that the base was made for."""
    kinds = {"full_attention": {**LONGROPE}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    assert length_limits(family_config("gemma3_text", rope_parameters=kinds)) == {"longrope": 18}
    assert length_limits(family_config("llama", rope_parameters={**DYNAMIC})) == {"dynamic": 64}
    assert length_limits(family_config("llama")) == length_limits(family_config("mamba")) == {}
