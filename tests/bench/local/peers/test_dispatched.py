"""Dispatched mixtures compute what MixtureLinear does, gradients too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.bench.local.peers.dispatched import DispatchedLinear, dispatch_adapters
from malora_dist.ops.balance import expert_statistics

T, I, O = 23, 20, 14  # noqa: E741
SPECS = {
    "malora": mixture_spec("malora", num_experts=5, top_k=2, r=3, shared_r=7),
    "molora": mixture_spec("molora", num_experts=5, top_k=3, r=3),
}


def gradients(model: nn.Module, x_TI: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Output, gradients by shape, and the routing; some experts have no token."""
    x = x_TI.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    named = {str(tuple(p.shape)): p.grad for p in model.parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **named}, model[0].routing  # type: ignore[dict-item, index]


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("method", SPECS)
def test_equals_the_mixture_on_the_same_weights(method: str, looped: bool) -> None:
    torch.manual_seed(0)
    spec, model = SPECS[method], nn.Sequential(nn.Linear(I, O)).double()
    inject_adapters(model, spec, ["0"], computation="dense")
    with torch.no_grad():
        model[0].B.normal_()
        model[0].input_projection.gate.normal_()
        model[0].input_projection.gate[1] -= 100  # an expert without tokens
    x = torch.randn(2, T, I, dtype=torch.float64) + 1
    expected, want, routing = gradients(model, x)
    dispatch_adapters(model, spec, torch.float64, looped=looped)
    assert isinstance(model[0], DispatchedLinear) and not (routing.expert_ids_TK == 1).any()
    got, grads, found = gradients(model, x)
    torch.testing.assert_close(got, expected)
    assert grads.keys() == want.keys() and len(grads) == (5 if method == "malora" else 4)
    for name, gradient in grads.items():
        # The mixture's factors are fp32, so are their gradients.
        torch.testing.assert_close(gradient, want[name].double(), rtol=1e-5, atol=1e-5, msg=name)
    counts = [expert_statistics([one]).counts_GLE for one in (routing, found)]
    assert torch.equal(counts[0].double(), counts[1].double())


def test_dropout_is_on_the_experts_input_alone() -> None:
    torch.manual_seed(0)
    spec, model = SPECS["molora"], nn.Sequential(nn.Linear(I, O))
    inject_adapters(model, spec, ["0"])
    dispatch_adapters(model, spec, torch.float32, dropout=0.5)
    model[0].B.data.normal_()
    x = torch.randn(T, I)
    first, routing = model(x), model[0].routing
    assert not torch.equal(model(x), first) and torch.equal(model[0].routing.probs_TE, routing.probs_TE)
    assert torch.equal(model.eval()(x), model(x))
