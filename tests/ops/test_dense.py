"""Both computations of the experts against the naive per-token twin, and which of them is chosen."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.ops.choices import prefer_grouped
from malora_dist.ops.dense import dense_experts
from malora_dist.ops.grouped import grouped_experts
from malora_dist.ops.routing import route
from tests.cases import ADAPTER_CASES, CASES, DROPOUT_P, AdapterCase, make_inputs, output_gradient
from tests.reference import adapter_reference, gradients

Form = Callable[..., Tensor]
SCALING = 1.5
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
FORMS = [
    pytest.param("malora", dense_experts, id="malora-dense"),
    pytest.param("malora", grouped_experts, id="malora-grouped"),
    pytest.param("molora", dense_experts, id="molora-dense"),
    pytest.param("molora", grouped_experts, id="molora-grouped"),
    pytest.param("hydralora", dense_experts, id="hydralora-dense"),
    pytest.param("hydralora", grouped_experts, id="hydralora-grouped"),
    pytest.param("lora", dense_experts, id="lora-dense"),
]


def _forward(form: Form, method: str, tensors: dict[str, Tensor], top_k: int, normalize: bool = False) -> Tensor:
    top_k = len(tensors["B"]) if method == "hydralora" else top_k
    routing = None if method == "lora" else route(tensors["x"], tensors["gate"], top_k, normalize)
    weights = routing if routing is None or form is grouped_experts else routing.gates_TE
    h = tensors["x"] * tensors["mask"] / (1 - DROPOUT_P)
    if method in ("malora", "hydralora"):
        h = F.linear(h, tensors["shared_A"])
        return form(tensors["base"] * 1, h, tensors.get("P"), tensors["B"], weights, SCALING)
    return form(tensors["base"] * 1, h, tensors["A"], tensors["B"], weights, SCALING)


def _twin(method: str, tensors: dict[str, Tensor], top_k: int, normalize: bool = False) -> Tensor:
    return adapter_reference(method, tensors, top_k=top_k, scaling=SCALING, normalize=normalize, dropout_p=DROPOUT_P)


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("method", "form"), FORMS)
@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_output_and_every_gradient_equal_the_twin(case: AdapterCase, method: str, form: Form, normalize: bool) -> None:
    tensors = make_inputs(case, method)
    y = _forward(form, method, tensors, case.K, normalize)
    expected = _twin(method, tensors, case.K, normalize)
    torch.testing.assert_close(y, expected, **CLOSE)
    leaves, direction = _leaves(tensors), output_gradient(case)
    # Without allow_unused: each rank's backward must touch every parameter, also with T = 0 or an unused expert.
    ours = torch.autograd.grad(y, list(leaves.values()), direction)
    for name, got, want in zip(leaves, ours, gradients(expected, list(leaves.values()), direction), strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"gradient of {name}: {text}")


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize(("method", "form"), FORMS)
@pytest.mark.parametrize("name", ["plain", "more-tokens", "all-on-one-k2"])
def test_bf16_is_near_exact(name: str, method: str, form: Form) -> None:
    """bf16 keeps 8 bits, a relative step of 2^-8 = 0.4 %: three roundings in a row stay below 1 % in norm, gradients
    (more roundings, and the softmax subtracts) below 3 %.

    The router's parameters stay fp32, as in the layer, so both sides choose the same experts.
    """
    case = CASES[name]
    exact = make_inputs(case, method)
    rounded = {key: value if key == "gate" else value.detach().bfloat16() for key, value in exact.items()}
    rounded["gate"] = exact["gate"].detach().float() if "gate" in exact else None
    low = {key: value.requires_grad_(key != "mask") for key, value in rounded.items() if value is not None}
    high = {key: value.detach().double().requires_grad_(key != "mask") for key, value in low.items()}
    y, expected = _forward(form, method, low, case.K), _twin(method, high, case.K)
    assert y.dtype == torch.bfloat16
    assert _relative_error(y, expected) < 0.01
    direction = output_gradient(case).bfloat16()
    ours = gradients(y, list(_leaves(low).values()), direction)
    for key, got, want in zip(
        _leaves(low), ours, gradients(expected, list(_leaves(high).values()), direction.double()), strict=True
    ):
        assert _relative_error(got, want) < 0.03, key


def test_cost_model() -> None:
    """Grouped pays only where many experts are computed in vain: not for k = N or low rank, but for wide experts."""
    assert not prefer_grouped(num_experts=8, top_k=8, r=256, in_width=4096, out_width=4096)
    assert not prefer_grouped(num_experts=8, top_k=2, r=12, in_width=32, out_width=1536)
    assert prefer_grouped(num_experts=8, top_k=2, r=192, in_width=4096, out_width=4096)
    assert prefer_grouped(num_experts=64, top_k=2, r=24, in_width=128, out_width=4096)
