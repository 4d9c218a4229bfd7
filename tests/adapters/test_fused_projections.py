"""Linears that enter together against the same linears each by itself."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters.fused_projections import FusedProjection
from malora_dist.adapters.inject import adapter_parameters, inject_adapters, mixture_layers, remove_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.shared_input import SharedInput
from malora_dist.convert.gates import constant_gates
from malora_dist.ops.dropout import token_keys
from tests.tiny_models import tiny_llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _model(method: str, fuse: bool, dtype: torch.dtype = torch.float64, **switches: Any) -> Any:
    model = tiny_llama(dtype).train()
    spec = mixture_spec(method, num_experts=4, r=3, normalize_gates=switches.pop("normalize_gates", False))
    inject_adapters(model, spec, TARGETS, fuse_projections=fuse, **switches)
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter_parameters(model):
        if name.endswith(".B"):
            parameter.data.normal_(generator=generator)
    return model


def _results(model: Any) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(2))
    keys_T = token_keys(0, 1, torch.arange(2).repeat_interleave(9), torch.arange(9).repeat(2))
    for _, layer in mixture_layers(model):
        layer.token_keys = keys_T
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    probs = [layer.routing.probs_TE for _, layer in mixture_layers(model)]
    (loss + sum(p.square().sum() for p in probs)).backward()
    return loss.detach(), probs, {name: p.grad for name, p in adapter_parameters(model)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("switches", [{}, {"lora_dropout": 0.2}, {"computation": "grouped", "normalize_gates": True}])
@pytest.mark.parametrize("method", ["malora", "hydralora"])
def test_equal_to_each_by_itself(method: str, switches: dict[str, Any], recompute: bool) -> None:
    alone, together = (_model(method, fuse, **switches) for fuse in (False, True))
    for model in (alone, together) if recompute else ():
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    (loss, probs, grads), (loss_2, probs_2, grads_2) = _results(alone), _results(together)
    torch.testing.assert_close(loss_2, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(probs_2, probs, rtol=1e-12, atol=1e-14)
    assert list(grads_2) == list(grads)
    torch.testing.assert_close(grads_2, grads, rtol=1e-9, atol=1e-13)


def test_names_do_not_change_and_removal_leaves_the_base() -> None:
    alone, together = _model("malora", False), _model("malora", True)
    assert [name for name, _ in together.named_parameters()] == [name for name, _ in alone.named_parameters()]
    joined = [module for module in together.modules() if isinstance(module, FusedProjection)]
    assert [module.num_linears for module in joined] == [3, 2] * 2
    remove_adapters(together)
    assert not any(isinstance(module, FusedProjection) for module in together.modules())
    assert all(not hasattr(module, "siblings") for module in together.modules())


def test_bf16_trains_fp32_parameters() -> None:
    model = _model("malora", True, torch.bfloat16)
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
    _, _, grads = _results(model)
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads.values())


def test_another_tensor_is_computed_anew() -> None:
    layers = [nn.Identity(), nn.Identity()]
    seen: list[Tensor] = []

    def compute(x: Tensor) -> list[Tensor]:
        seen.append(x)
        return [x, 2 * x]

    shared = SharedInput(layers, compute)
    first, second = torch.ones(3), torch.zeros(3)
    assert shared.take(layers[0], first) is first and torch.equal(shared.take(layers[1], first.view(3)), 2 * first)
    assert len(seen) == 1
    shared.take(layers[0], first)
    shared.take(layers[1], second)
    shared.take(layers[1], second)
    assert len(seen) == 4, "a part is taken once, and only of the tensor it was made of"
    shared.take(layers[0], second)
    shared.take(layers[1], second.add_(1))
    assert len(seen) == 5, "numbers that changed in place are another tensor"


def test_a_copy_of_the_model_enters_by_itself() -> None:
    model = _model("malora", True)
    with torch.no_grad():
        model(input_ids=torch.arange(6)[None], use_cache=False)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.zero_grad()
    (loss, _, grads), (loss_2, _, grads_2) = _results(model), _results(twin)
    assert torch.equal(loss, loss_2)
    torch.testing.assert_close(grads_2, grads)


def test_what_was_made_without_a_graph_is_not_taken_into_one() -> None:
    model = _model("malora", True)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, 48, dtype=torch.float64)
    with torch.no_grad():
        attention.q_proj(x)
    attention.k_proj(x).sum().backward()
    assert attention.k_proj.input_projection.shared_A.grad is not None


def test_deciding_reaches_layers_that_enter_together() -> None:
    alone, together = _model("malora", False), _model("malora", True)
    gates = {name: torch.tensor([0.5, 0.0, 0.25, 0.0]) for name, _ in mixture_layers(alone)}
    ids = torch.arange(6)[None]
    logits = []
    for model in (alone, together):
        with constant_gates(model, gates):
            logits.append(model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0])
    assert any(isinstance(module, FusedProjection) for module in together.modules())
