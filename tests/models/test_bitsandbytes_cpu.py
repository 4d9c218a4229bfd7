"""A base that bitsandbytes has quantised: measured and then trained, it gives the gradients of one never measured."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import METHODS, mixture_spec


def quantised(kind: str) -> Any:
    """Two linears, of which the second is not adapted."""
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": "too" in kind}
    if kind == "8-bit":
        options = {"has_fp16_weights": False}
    make = bnb.nn.Linear8bitLt if kind == "8-bit" else bnb.nn.Linear4bit
    torch.manual_seed(0)
    model = nn.Sequential(make(128, 192, **options), nn.SiLU(), make(192, 32, **options)).to("cpu")
    return model.requires_grad_(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["4-bit", "4-bit, scales too", "8-bit"])
def test_gradients_after_a_forward_in_eval(kind: str, method: str) -> None:
    model = quantised(kind)
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3), ["0"])
    for _, layer in mixture_layers(model):
        nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found = []
    for measured_first in (False, True):
        each = copy.deepcopy(model)
        if measured_first:
            each.eval()
            with torch.no_grad():
                each(x)
        each.train()
        each(x).sum().backward()
        found.append([x.grad, *(parameter.grad for _, parameter in adapter_parameters(each))])
        x.grad = None
    assert all(gradient is not None and gradient.any() for gradient in found[0])
    # The layout of eval rounds the scales to bfloat16.
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_doras_norms_are_those_of_the_weight_that_was_quantised(kind: str) -> None:
    model = quantised(kind)
    weight_OI = model[0](torch.eye(128)).T - model[0](torch.zeros(1, 128)).T
    inject_adapters(model, mixture_spec("dora", r=3), ["0"])
    torch.testing.assert_close(model[0].dora.magnitude.detach(), weight_OI.norm(dim=1), rtol=0.01, atol=0.01)
