"""Activation checkpointing that would lose the gradient of the balance loss is refused in its first forward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist import MaloraConfig, get_malora_model
from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.errors import TrainingError
from tests.tiny_models import tiny_llama

IDS = torch.arange(20)[None]
BALANCED = ("malora", "molora")


def adapted(method: str) -> Any:
    model = tiny_llama().train()
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_reentrant_checkpointing_is_refused_where_there_is_a_balance_loss(method: str) -> None:
    model = adapted(method)
    model.activation_checkpointing_enable({"use_reentrant": True})
    if method in BALANCED:
        with pytest.raises(TrainingError, match="reentrant.*use_reentrant=False"):
            model(IDS, use_cache=False)
    else:
        model(IDS, use_cache=False).logits.sum().backward()


def test_one_layer_under_torchs_own_function() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(3, 48, requires_grad=True)
    layer = adapted("malora").model.layers[0].mlp.up_proj
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        checkpoint(layer, x, use_reentrant=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.routing.probs_TE.requires_grad


class Offloaded(torch.autograd.Function):
    """Checkpointing of another's making."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            y: Tensor = layer(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            torch.autograd.backward(ctx.layer(again), grads)
        return None, again.grad


def test_checkpointing_and_tiles_by_whatever_name() -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    mlp, x = adapted("malora").model.layers[0].mlp, torch.ones(1, 8, 48, requires_grad=True)
    with pytest.raises(TrainingError, match="autograd function around layers"):
        Offloaded.apply(mlp.up_proj, x)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    with pytest.raises(TrainingError, match="autograd function around layers"):
        TiledMLP.apply(lambda module, part: type(module).forward(module, part), mlp, x, 2, trained)


def test_a_model_with_a_balance_loss_takes_reentrant_checkpointing_and_no_other_function() -> None:
    from torch.utils.checkpoint import checkpoint

    model: Any = get_malora_model(tiny_llama(), MaloraConfig(r=3, num_experts=4)).train()
    layer, x = model.model.layers[0].mlp.up_proj, torch.ones(3, 48, requires_grad=True)
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    with pytest.raises(TrainingError, match=r"around layers.*\(Offloaded\).*loss: choose use_reentrant=False"):
        Offloaded.apply(layer, x)
    with pytest.raises(TrainingError, match=r"\(Offloaded\)"):
        checkpoint(lambda rows: Offloaded.apply(layer, rows), x, use_reentrant=True)


def test_a_forward_without_a_graph_is_no_checkpointing() -> None:
    """As measuring in the middle of a training does it, whatever the mode."""
    model = adapted("malora")
    with torch.no_grad():
        model(IDS)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert all(not layer.routing.probs_TE.requires_grad for _, layer in mixture_layers(model))
