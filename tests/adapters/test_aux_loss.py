"""The balance loss of a forward: its value and every gradient beside the naive twin, whatever runs the layers again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from malora_dist import MaloraConfig, aux_loss, get_malora_model
from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.errors import TrainingError
from tests.reference import balance_reference
from tests.tiny_models import tiny_llama

IDS = torch.arange(40).view(2, 20) * 7 % 61
MASK = torch.ones(2, 20, dtype=torch.long)
MASK[0, 13:] = 0
MASK[1, :3] = 0
LABELS = IDS.where(MASK == 1, -100)
COEFFICIENT = 0.5
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
# transformers computes cross-entropies in float32.
ROUNDED: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}


def adapted(**arguments: Any) -> Any:
    """A model in float64 whose adapters do something."""
    config = MaloraConfig(**{"r": 3, "num_experts": 4, "router_aux_loss_coef": COEFFICIENT} | arguments)
    model: Any = get_malora_model(tiny_llama(torch.float64), config)
    model.double().train()
    for number, (_, layer) in enumerate(mixture_layers(model)):
        layer.B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def twin(model: Any, mask: Tensor | None) -> Tensor:
    """The mean over routers of their balance losses."""
    routings = [layer.routing for _, layer in mixture_layers(model)]
    mask_T = None if mask is None else mask.flatten()
    losses = [balance_reference(routing.probs_TE, routing.expert_ids_TK, mask_T) for routing in routings]
    return torch.stack(losses).mean()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model)}


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("method", ["malora", "molora"])
def test_value_and_gradients_are_those_of_the_twin(method: str, mask: Tensor | None) -> None:
    model = adapted(method=method)
    model(IDS, attention_mask=mask)
    loss, wanted = aux_loss(model, mask), twin(model, mask)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    gates = [layer.input_projection.gate for _, layer in mixture_layers(model)]
    for got, want in zip(
        *(torch.autograd.grad(each, gates, retain_graph=True) for each in (loss, wanted)), strict=True
    ):
        assert got.any()
        torch.testing.assert_close(got, want, **CLOSE)


def test_it_is_in_the_loss_in_training_and_not_in_evaluation() -> None:
    model = adapted()
    plain = adapted(router_aux_loss_coef=0.0)
    given = {"attention_mask": MASK, "labels": LABELS}
    loss = model(IDS, **given).loss
    assert twin(model, MASK) > 1.01
    torch.testing.assert_close(loss, plain(IDS, **given).loss + COEFFICIENT * twin(model, MASK), **ROUNDED)
    as_tuple = model(IDS, MASK, labels=LABELS, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, loss, **ROUNDED)
    assert torch.equal(model.eval()(IDS, **given).loss, plain.eval()(IDS, **given).loss)
    assert model.train()(IDS, attention_mask=MASK).loss is None
    with model.disable_adapter():
        base = model(IDS, **given).loss
    torch.testing.assert_close(base, tiny_llama(torch.float64)(IDS, **given).loss, **ROUNDED)


@pytest.mark.parametrize("method", ["lora", "dora", "hydralora"])
def test_nothing_to_balance(method: str) -> None:
    model = adapted(method=method)
    model(IDS)
    assert aux_loss(model) == 0
    given = {"labels": IDS}
    assert torch.equal(model(IDS, **given).loss, adapted(method=method, router_aux_loss_coef=0.0)(IDS, **given).loss)


def test_a_model_of_inject_adapters_has_it_too() -> None:
    model = tiny_llama(torch.float64)
    inject_adapters(model, mixture_spec("malora", num_experts=4, r=3))
    model(IDS)
    torch.testing.assert_close(aux_loss(model), twin(model, None), **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"method": "molora", "normalize_gates": True}, {"fuse_projections": True}])
def test_checkpointing_changes_no_gradient(arguments: dict[str, Any], reentrant: bool) -> None:
    """Also where the loss is scaled, as accumulation and fp16 do it."""
    model = adapted(**arguments)
    given = {"attention_mask": MASK, "labels": LABELS, "use_cache": False}
    plain = model(IDS, **given).loss
    wanted = gradients(model, 0.125 * plain)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(IDS, **given).loss
    found = gradients(model, 0.125 * loss)
    torch.testing.assert_close(loss, plain, **CLOSE)
    torch.testing.assert_close(found, wanted, **CLOSE)
    model.malora_adapters.configs["default"] = MaloraConfig(router_aux_loss_coef=0)
    without = gradients(model, 0.125 * model(IDS, **given).loss)
    assert all(not torch.allclose(found[n], without[n]) for n in found if n.endswith("gate"))


class Repeated(nn.Module):
    """One linear that is called once, and one that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.often = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        for layer in (self.once, self.often, self.often, self.often):
            x = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        return x


def test_repeated_layers_count_in_every_call() -> None:
    model: Any = get_malora_model(Repeated(), MaloraConfig(r=2, num_experts=4, target_modules=["once", "often"]))
    model.double().train()
    calls: dict[str, list[Any]] = {"once": [], "often": []}
    for name, layer in mixture_layers(model):
        layer.B.data.normal_()
        layer.register_forward_hook(lambda module, _inputs, _output, name=name: calls[name].append(module.routing))
    x_TI = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    y_TO = model(x_TI)
    losses = [
        balance_reference(torch.cat([c.probs_TE for c in each]), torch.cat([c.expert_ids_TK for c in each]), None)
        for each in calls.values()
    ]
    torch.testing.assert_close(aux_loss(model), torch.stack(losses).mean(), **CLOSE)
    wanted = gradients(model, y_TO.square().mean() + 3 * aux_loss(model))
    for reentrant in (False, True):
        y_TO = model(x_TI, reentrant=reentrant)
        found = gradients(model, y_TO.square().mean() + 3 * aux_loss(model))
        torch.testing.assert_close(found, wanted, **CLOSE)
    layers = dict(mixture_layers(model))
    assert all(layer.deferred_balance is not None and not layer.deferred_balance.gradients for layer in layers.values())
    # What is called outside of the model's forward is not added to it, and lets go of it.
    model.often(x_TI)
    assert not layers["often"].routings and layers["once"].routings


def test_two_forwards_of_one_reentrant_backward() -> None:
    """The later one is run again first; each router takes up what its own forward has left."""
    model = adapted()
    batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in (IDS, IDS[:1, :11] + 1)]
    wanted = gradients(model, sum(model(**batch).loss for batch in batches))  # type: ignore[arg-type]
    model.activation_checkpointing_enable({"use_reentrant": True})
    found = gradients(model, sum(model(**batch).loss for batch in batches))  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, **CLOSE)
    for _, layer in mixture_layers(model):
        assert not layer.deferred_balance.gradients


@pytest.mark.parametrize("mask", [None, MASK])
def test_two_losses_of_one_reentrant_forward(mask: Tensor | None) -> None:
    """That of `outputs.loss`, and one that a loop adds; of other tokens, too."""
    model = adapted()

    def both(scale: float) -> Any:
        loss = model(IDS, attention_mask=MASK, labels=LABELS, use_cache=False).loss
        return gradients(model, loss + scale * aux_loss(model, mask))

    wanted = both(0.3)
    model.activation_checkpointing_enable({"use_reentrant": True})
    torch.testing.assert_close(both(0.3), wanted, **CLOSE)
    assert any(not torch.allclose(found, wanted[name]) for name, found in both(0.0).items() if name.endswith("gate"))


def test_a_balance_loss_that_goes_backward_alone_is_refused_under_reentrant_checkpointing() -> None:
    """No layer is run again then."""
    model = adapted(router_aux_loss_coef=0.0)
    model.activation_checkpointing_enable({"use_reentrant": True})
    logits = model(IDS, use_cache=False).logits
    with pytest.raises(TrainingError, match="routers got no gradient: .* add aux_loss"):
        aux_loss(model).backward()
    logits.square().mean().backward()
    loss = model(IDS, use_cache=False).logits.square().mean() + aux_loss(model)
    loss.backward()


def test_a_plain_loop_under_reentrant_checkpointing() -> None:
    model = adapted(router_aux_loss_coef=0.0)
    wanted = gradients(model, model(IDS).logits.square().mean() + 0.3 * aux_loss(model))
    model.activation_checkpointing_enable({"use_reentrant": True})
    logits = model(IDS, use_cache=False).logits
    torch.testing.assert_close(gradients(model, logits.square().mean() + 0.3 * aux_loss(model)), wanted, **CLOSE)


def test_accumulated_micro_batches_share_the_loss() -> None:
    """As Trainer does it: sums over all learned tokens of a step, which micro-batches have more or less of."""
    model, plain = adapted(), adapted(router_aux_loss_coef=0.0)
    parts = [slice(0, 1), slice(1, 2)]
    items = (LABELS[:, 1:] != -100).sum()
    total = 0.0
    for part in parts:
        given = {"attention_mask": MASK[part], "labels": LABELS[part], "num_items_in_batch": items}
        added = model(IDS[part], **given).loss - plain(IDS[part], **given).loss
        weight = (LABELS[part][:, 1:] != -100).sum() / items
        torch.testing.assert_close(added, COEFFICIENT * weight * twin(model, MASK[part]), **ROUNDED)
        total += float(weight)
    assert total == pytest.approx(1.0)


def test_who_asks_as_transformers_mixtures_are_asked_finds_it_in_the_outputs() -> None:
    model = adapted()
    assert (model.config.output_router_logits, model.config.router_aux_loss_coef) == (False, COEFFICIENT)
    outputs = model(IDS, attention_mask=MASK, labels=LABELS, output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, twin(model, MASK), **CLOSE)
    with torch.no_grad():
        outputs = model.eval()(IDS, output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, twin(model, None), **CLOSE)
    model.config.output_router_logits = True
    assert "aux_loss" in model(IDS) and model.config.output_router_logits
    model.unload()
    assert not hasattr(model.config, "output_router_logits") and not hasattr(model.config, "router_aux_loss_coef")
