"""Weights rounded once: the same numbers as rounding for each product, for as long as the block lasts."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.ops.products import WeightCopies, kept_weight_copies
from tests.tiny_models import tiny_llama

IDS = torch.arange(24)[None] % 61


class RoundedNumbers(TorchDispatchMode):
    """Counts the numbers of fp32 tensors with a gradient that are copied to bf16, by storage."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.storages = {weight.untyped_storage()._cdata for weight in weights}
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        if "copy" in str(function) and result.dtype == torch.bfloat16:
            source = arguments[1] if str(function).startswith("aten.copy_") else arguments[0]
            if source.dtype == torch.float32 and source.untyped_storage()._cdata in self.storages:
                self.numbers += source.numel()
        return result


def _model(method: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    model = tiny_llama(dtype)
    numbers = {} if method in ("lora", "dora") else {"num_experts": 4}
    inject_adapters(model, mixture_spec(method, r=3, **numbers), lora_dropout=0.1, **options)
    for name, parameter in adapter_parameters(model):
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def _two_passes(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of two micro-batches, and the gradients they add up to."""
    model.zero_grad()
    losses = []
    for ids in (IDS, IDS + 5):
        torch.manual_seed(1)  # of the dropout masks
        loss = model(input_ids=ids).logits.float().logsumexp(-1).mean()
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"computation": "grouped"}, {"fuse_projections": False}])
@pytest.mark.parametrize("method", METHODS)
def test_kept_copies_change_no_bit(method: str, options: dict[str, Any]) -> None:
    model = _model(method, **options)
    plain_losses, plain = _two_passes(model)
    with kept_weight_copies(model):
        losses, gradients = _two_passes(model)
    assert all(map(torch.equal, losses, plain_losses)) and gradients.keys() == plain.keys()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients.items())


def test_each_weight_is_rounded_once() -> None:
    model = _model("malora")
    weights = [parameter for _, parameter in adapter_parameters(model)]
    counts = []
    for block in (kept_weight_copies(model), nullcontext()):
        with block, RoundedNumbers(weights) as rounded:
            _two_passes(model)
        counts.append(rounded.numbers)
    # Several S_A and routers are joined first: what is rounded then is no weight but a copy of it.
    alone = sum(p.numel() for n, p in adapter_parameters(model) if n.endswith((".P", ".B")))
    assert counts[0] == alone and counts[1] >= 4 * alone


def test_new_weights_show_in_the_next_block() -> None:
    """Written to behind PyTorch's back, as ZeRO does: no version of the parameter changes."""
    model = _model("malora")
    seen = []
    for _ in range(2):
        with kept_weight_copies(model):
            seen.append(_two_passes(model)[0][0])
        for _, parameter in adapter_parameters(model):
            parameter.data = parameter.data * 1.5
    assert not torch.equal(*seen)
    model.eval()
    with torch.no_grad(), kept_weight_copies(model):
        kept = model(input_ids=IDS).logits
    assert torch.equal(kept, model(input_ids=IDS).logits)


def test_nothing_is_left_behind_even_by_an_error() -> None:
    model = _model("malora")
    with pytest.raises(ZeroDivisionError), kept_weight_copies(model):
        _two_passes(model)
        assert any(isinstance(each, WeightCopies) for each in _copies(model))
        raise ZeroDivisionError
    assert set(_copies(model)) == {None}


def test_weights_of_the_bases_dtype_are_not_kept() -> None:
    """A view of a weight would hold what ZeRO-3 has gathered."""
    model = _model("malora", torch.float32)
    with kept_weight_copies(model):
        _two_passes(model)
        assert all(copies is not None and not copies.tensors for copies in _copies(model))


def _copies(model: nn.Module) -> list[WeightCopies | None]:
    return [module.weight_copies for module in model.modules() if hasattr(module, "weight_copies")]
