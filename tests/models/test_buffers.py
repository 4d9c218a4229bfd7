"""Buffers that no checkpoint stores: transformers' values on the meta device's model, or a refusal that names them."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from malora_dist.errors import ConfigError
from malora_dist.models.buffers import rebuild_buffers
from tests.families import family_config, family_model
from tests.tiny_models import tiny_config

# Frequencies for each kind of layer, scales, sinusoids, triangles, slopes, biases of routers.
FAMILIES = ("gemma3_text", "gptj", "gpt_bigcode", "gpt_neo", "codegen", "bloom", "minimax", "deepseek_v3", "ctrl")


def _empty(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_a_model_in_memory(family: str) -> None:
    empty, made = _empty(family_config(family)), family_model(family, noise=0.0)
    rebuild_buffers(empty)
    wanted = dict(made.named_buffers())
    assert dict(empty.named_buffers()).keys() == wanted.keys()
    for name, buffer in empty.named_buffers():
        assert buffer.dtype == wanted[name].dtype and torch.equal(buffer, wanted[name]), name
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_random_numbers_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    rebuild_buffers(_empty(tiny_config()))
    assert torch.equal(torch.get_rng_state(), state)


class Unwritten(LlamaForCausalLM):
    """Keeps a buffer that `_init_weights` does not know."""

    persistent = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scales = nn.Buffer(torch.arange(3.0), persistent=self.persistent)


class Stored(Unwritten):
    """Has it in its checkpoints."""

    persistent = True


class Hidden(LlamaForCausalLM):
    """Keeps a tensor as an attribute, which was made on the meta device with the rest."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.slopes = torch.arange(3.0)


@pytest.mark.parametrize(("kind", "named"), [(Unwritten, "scales"), (Hidden, "model.slopes")])
def test_what_has_no_value_is_refused_by_name(kind: Any, named: str) -> None:
    with torch.device("meta"):
        model = kind(tiny_config())
    with pytest.raises(ConfigError, match=rf"{kind.__name__} is not supported: .* does not compute \({named}\)"):
        rebuild_buffers(model)


def test_what_a_checkpoint_must_hold_is_told() -> None:
    with torch.device("meta"):
        model = Stored(tiny_config())
    assert rebuild_buffers(model) == {"scales"}
