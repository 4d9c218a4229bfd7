"""Linears whose input is projected by one product, against the same linears each by itself."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters, remove_adapters
from malora_dist.adapters.input_projection import FusedProjection
from malora_dist.adapters.methods import mixture_spec
from malora_dist.convert.gates import constant_gates
from malora_dist.ops.dropout import token_keys
from tests.tiny_models import tiny_llama

SPEC = {"normalize_gates", "router_input", "router_dtype"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _model(method: str, fuse: bool, dtype: torch.dtype = torch.float64, **switches: Any) -> Any:
    model = tiny_llama(dtype).train()
    spec = mixture_spec(method, num_experts=4, r=3, **{key: switches.pop(key) for key in SPEC & switches.keys()})
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
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"lora_dropout": 0.2},
        {"computation": "grouped", "normalize_gates": True},
        {"router_input": "h", "lora_dropout": 0.2},
        {"router_input": "h", "router_dtype": "input"},
    ],
)
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
    fused = [module for module in together.modules() if isinstance(module, FusedProjection)]
    assert [module.num_linears for module in fused] == [3, 2] * 2
    remove_adapters(together)
    assert not any(isinstance(module, FusedProjection) for module in together.modules())


def test_bf16_trains_fp32_parameters() -> None:
    model = _model("malora", True, torch.bfloat16)
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
    _, _, grads = _results(model)
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads.values())


def test_another_tensor_is_projected_anew() -> None:
    attention = _model("malora", True).model.layers[0].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").input_projection for name in "qkv")
    shared = attention.q_proj.shared_input
    calls: list[int] = []
    shared.fused.register_forward_hook(lambda *_: calls.append(1))
    first, second = torch.zeros(2, 1, 5, 48, dtype=torch.float64)
    (inputs, tokens), (of_k, _), _ = shared.take(q, first), shared.take(k, first.view(1, 5, 48)), shared.take(v, first)
    assert inputs.x_TI is of_k.x_TI and tokens is None
    assert len(calls) == 1
    for projection, x in ((q, first), (k, second), (k, second)):
        shared.take(projection, x)
    assert len(calls) == 4, "what was made for a linear is taken once, and only of the tensor that it was made of"
    shared.take(q, second)
    shared.take(v, second.add_(1))
    assert len(calls) == 5, "numbers that changed in place are another tensor"


def test_a_copy_of_the_model_shares_nothing() -> None:
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


def test_deciding_reaches_fused_projections() -> None:
    alone, together = _model("malora", False), _model("malora", True)
    gates = {name: torch.tensor([0.5, 0.0, 0.25, 0.0]) for name, _ in mixture_layers(alone)}
    ids = torch.arange(6)[None]
    logits = []
    for model in (alone, together):
        with constant_gates(model, gates):
            logits.append(model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0])
    assert any(isinstance(module, FusedProjection) for module in together.modules())
