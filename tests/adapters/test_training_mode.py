"""A frozen base in a training run: what it draws, changes and leaves out in training elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.training_mode import train_adapters
from tests.families import family_model

IDS = torch.arange(3, 19)[None]


def _logits(model: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"router_jitter_noise": 0.5}),
        ("phimoe", {"router_jitter_noise": 0.5}),
        ("gemma3n_text", {"altup_coef_clip": 0.01}),
    ],
)
def test_a_base_computes_what_it_computes_in_evaluation(family: str, changes: dict[str, Any]) -> None:
    """Noise before a router, experts that are sampled, weights that are cut."""
    model = family_model(family, **changes)
    inject_adapters(model, mixture_spec("lora", r=2), ["q_proj"])
    expected = _logits(model, 0)
    model.train()
    assert not torch.equal(_logits(model, 1), expected)
    model = family_model(family, **changes)
    inject_adapters(model, mixture_spec("lora", r=2), ["q_proj"])
    train_adapters(model)
    assert torch.equal(_logits(model, 1), expected) and torch.equal(_logits(model, 2), expected)


def test_adapters_drop_out_and_layers_are_recomputed() -> None:
    """Each layer runs again in backward, and its adapters are in training mode."""
    model = family_model("mixtral")
    inject_adapters(model, mixture_spec("lora", r=2), ["q_proj"], lora_dropout=0.5)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    train_adapters(model)
    assert model.training and all(layer.training for _, layer in mixture_layers(model))
    calls: list[nn.Module] = []
    for _, layer in mixture_layers(model):
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert len(calls) == 4
    assert all(parameter.grad is not None for name, parameter in adapter_parameters(model))
