"""Samples of a packed row do not see each other, on whatever base; one that lets them is found."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    FalconConfig,
    MistralConfig,
    Qwen2Config,
)

from malora_dist.engine.attention import choose_attention
from malora_dist.engine.packing import TOLERANCE, packing_difference
from malora_dist.nn.packed_attention import register_attention
from tests.models import SIZES, tiny_config

BASES: dict[str, Any] = {
    "llama": tiny_config(),
    "a window of 4": MistralConfig(**SIZES, sliding_window=4),
    "biases": Qwen2Config(**SIZES),
    "its own attention": FalconConfig(**SIZES),
    "learned positions": BioGptConfig(**SIZES),
}


def _difference(config: Any) -> float:
    register_attention()
    torch.manual_seed(0)
    attention = choose_attention("auto", config, 4, None, False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the usual 0.02 hides what attention does
            parameter.data *= 10
    return float(packing_difference(_Engine(model), torch.device("cpu")))


class _Engine:
    """A model as DeepSpeed wraps it."""

    def __init__(self, model: Any) -> None:
        self.module, self.eval, self.train = model, model.eval, model.train

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def get_output_embeddings(self) -> Any:
        return self.module.get_output_embeddings()


@pytest.mark.parametrize("name", BASES)
def test_samples_are_kept_apart(name: str) -> None:
    assert _difference(BASES[name]) <= TOLERANCE


def test_a_base_that_mixes_them_is_found() -> None:
    """BLOOM takes no mask of its caller, and makes none by positions."""
    assert _difference(BloomConfig(**SIZES | {"n_layer": 2, "n_head": 4})) > 10 * TOLERANCE
