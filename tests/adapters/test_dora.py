"""DoRA and rank-stabilised scaling against real `peft`, and what the norm is made of."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.dora import DoRALayer
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import mixture_spec
from malora_dist.errors import ConfigError
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.dropout import dropout_mask
from malora_dist.ops.nf4 import quantize_nf4
from tests.tiny_models import tiny_llama

IDS = torch.arange(30)[None] % 61
TARGETS = ["q_proj", "down_proj"]
FACTORS = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def _peft(model: Any, dropout: float, **switches: bool) -> Any:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, lora_dropout=dropout, **switches)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _theirs(peft_model: Any) -> dict[str, nn.Parameter]:
    """PEFT's parameters under our names."""
    parameters = dict(peft_model.named_parameters())
    return {
        name.removeprefix("base_model.model.").replace(f"{peft}.default.weight", ours): parameter
        for name, parameter in parameters.items()
        for ours, peft in FACTORS.items()
        if f".{peft}." in name
    }


def test_a_weight_in_parts_is_refused() -> None:
    """As ZeRO-3 leaves it: an empty tensor with an id."""
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data, weight.ds_id = torch.empty(0), 7
    with pytest.raises(ConfigError, match=r"dora' measures.*whole=malora_dist\.distributed\.zero3\.gathered"):
        inject_adapters(model, mixture_spec("dora", r=2), TARGETS)


def test_a_weight_of_8_bits_whose_scales_only_its_layer_knows_is_refused() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = nn.ModuleDict({"plain": nn.Linear(128, 128), "fp8": FP8Linear(128, 128, block_size=(128, 128))})
    with pytest.raises(ConfigError, match=r"dora' measures.* a FP8Linear keeps them in 8 bits \(float8_e4m3fn\)"):
        inject_adapters(model, mixture_spec("dora", r=2), ["plain", "fp8"])
    assert not list(mixture_layers(model))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_equals_peft_in_logits_and_gradients(method: str, use_rslora: bool, dropout: float) -> None:
    """In float64, in training, with our dropout masks in the place of PEFT's."""
    ours = tiny_llama(torch.float64, attention_bias=True)
    peft_model = _peft(tiny_llama(torch.float64, attention_bias=True), dropout, use_rslora=use_rslora,
                       use_dora=method == "dora")  # fmt: skip
    spec = mixture_spec(method, r=3, lora_alpha=5.0, use_rslora=use_rslora)
    inject_adapters(ours, spec, TARGETS, lora_dropout=dropout)
    ours.double().train()
    peft_model.train()
    theirs, generator = _theirs(peft_model), torch.Generator().manual_seed(3)
    mine = dict(adapter_parameters(ours))
    assert set(mine) == set(theirs)
    for name, parameter in mine.items():
        if name.endswith(".magnitude"):
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=0)
        value = theirs[name].detach() + 0.3 * torch.randn(theirs[name].shape, generator=generator).double()
        theirs[name].data.copy_(value)
        parameter.data.copy_(value.view_as(parameter))
    if dropout:
        _share_masks(ours, peft_model, dropout)

    ours_logits, peft_logits = ours(IDS).logits, peft_model(IDS).logits
    torch.testing.assert_close(ours_logits, peft_logits, **CLOSE)
    direction = torch.randn(ours_logits.shape, generator=generator).double()
    ours_logits.backward(direction)
    peft_logits.backward(direction)
    for name, parameter in mine.items():
        assert theirs[name].grad.any()
        torch.testing.assert_close(parameter.grad.view_as(theirs[name]), theirs[name].grad, **CLOSE)


def _share_masks(ours: nn.Module, peft_model: Any, dropout: float) -> None:
    class Masked(nn.Module):
        def __init__(self, layer: MixtureLinear) -> None:
            super().__init__()
            mask = dropout_mask(layer.token_keys, layer.input_projection.input_salt, layer.in_features, dropout).bool()
            self.scale_TI = mask.double() / (1 - dropout)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale_TI

    for name, layer in mixture_layers(ours):
        layer.token_keys = torch.arange(IDS.shape[1], dtype=torch.int32) * 7919
        peft_model.base_model.model.get_submodule(name).lora_dropout["default"] = Masked(layer)


def test_norm_is_that_of_the_unpacked_weight() -> None:
    """With a 4-bit base the magnitude starts as the norm of what the base computes with, not of what was quantised."""
    linear = nn.Linear(64, 8)
    base = NF4Linear(quantize_nf4(linear.weight), linear.bias.detach(), 64, 8, False)
    magnitude = DoRALayer(8)
    magnitude.measure(base)
    torch.testing.assert_close(magnitude.base_squares.sqrt(), base.dequantize(torch.float32).norm(dim=1))
    assert not torch.allclose(magnitude.base_squares.sqrt(), linear.weight.norm(dim=1), rtol=1e-4)


def test_a_row_of_zeros_stays_finite() -> None:
    base = nn.Linear(6, 3)
    base.weight.data[1] = 0
    layer = MixtureLinear(base, mixture_spec("dora", r=2), in_features=6, out_features=3)
    y = layer(torch.randn(4, 6))
    y.sum().backward()
    assert torch.equal(y[:, 1], base.bias[1].expand(4))
    assert all(torch.isfinite(parameter.grad).all() for _, parameter in layer.factors())
