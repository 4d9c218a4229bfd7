"""Second derivatives of adapted layers are refused: their backward reads what forward has kept as constants."""

import ast
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from malora_dist import MaloraConfig, get_malora_model
from malora_dist.ops.dropout import keyed_dropout, token_keys
from tests.multiprocess import ROOT

# Linear in the one input that has a gradient, so that autograd differentiates its backward rightly.
DIFFERENTIABLE_AGAIN = {"_NF4Product"}


def functions() -> Iterator[ast.ClassDef]:
    """Yield every autograd function of the package."""
    for path in (ROOT / "malora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("autograd.Function") for b in node.bases):
                yield node


def test_every_autograd_function_is_once_differentiable() -> None:
    found = list(functions())
    assert len(found) > 12
    for function in found:
        backward = next(node for node in function.body if getattr(node, "name", "") == "backward")
        decorators = [ast.unparse(decorator) for decorator in backward.decorator_list]  # type: ignore[attr-defined]
        assert ("once_differentiable" in decorators) != (function.name in DIFFERENTIABLE_AGAIN), function.name


@pytest.mark.parametrize("computation", ["dense", "grouped"])
@pytest.mark.parametrize("method", ["malora", "molora", "hydralora", "lora"])
def test_a_gradient_penalty_is_refused(method: str, computation: str) -> None:
    config = MaloraConfig(method=method, r=2, num_experts=4, computation=computation, target_modules=["0"])
    model: Any = get_malora_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    layer = model[0]
    torch.nn.init.normal_(layer.B)
    (gradient,) = torch.autograd.grad(model(torch.ones(3, 6)).square().sum(), layer.B, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_dropout_is_refused_too() -> None:
    x_TI = torch.ones(4, 6, requires_grad=True)
    dropped = keyed_dropout(x_TI, token_keys(3, 7, torch.arange(4), torch.arange(4)), 5, 0.5)
    (gradient,) = torch.autograd.grad(dropped.square().sum(), x_TI, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_torch_func_is_refused() -> None:
    config = MaloraConfig(r=2, num_experts=4, target_modules=["0"])
    model: Any = get_malora_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x_TI: model(x_TI).sum())(torch.ones(3, 6))
