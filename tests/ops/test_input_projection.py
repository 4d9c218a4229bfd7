"""Projections of the input for experts and router, against the same in plain operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.ops.dropout import dropout_mask, token_keys
from malora_dist.ops.input_projection import project
from tests.reference import gradients

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SALT, P = 7, 0.25
SHAPES = {
    "malora": ([(5, 13)], [(4, 13)]),
    "lora": ([(1, 3, 13)], []),
    "router alone": ([], [(4, 13)]),
    "molora fused": ([(4, 3, 13), (4, 3, 13)], [(4, 13), (4, 13)]),
    "malora fused": ([(5, 13)] * 3, [(4, 13)] * 3),
}


def _tensors(name: str, T: int) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    downs, gates = (
        [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
        for shapes in SHAPES[name]
    )
    x_TI = torch.randn(T, 13, generator=generator, dtype=torch.float64).requires_grad_()
    return x_TI, downs, gates, token_keys(1, 2, torch.arange(T) // 3, torch.arange(T) % 3)


def _twin(x_TI: Tensor, downs: list[Tensor], gates: list[Tensor], mask_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = [F.linear(x_TI * mask_TI / (1 - P), row) for down in downs for row in down.flatten(0, -2)[:, None]]
    logits = [F.linear(x_TI, row) for gate in gates for row in gate[:, None]]
    none = x_TI.new_empty(len(x_TI), 0)
    return x_TI, torch.cat([none, *parts], dim=1), torch.cat([none, *logits], dim=1)


@pytest.mark.parametrize("T", [0, 1, 17])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_the_twin(name: str, dropout: bool, T: int) -> None:
    x_TI, downs, gates, keys_T = _tensors(name, T)
    ours = project(x_TI, downs, gates, keys_T if dropout else None, SALT, P)
    mask_TI = (
        dropout_mask(keys_T, SALT, 13, P).bool().double()
        if dropout
        else torch.full((T, 13), 1 - P, dtype=torch.float64)
    )
    expected = _twin(x_TI, downs, gates, mask_TI)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    leaves, direction = [x_TI, *downs, *gates], torch.randn(sum(part.shape[1] for part in ours), dtype=torch.float64)
    found = torch.autograd.grad((torch.cat(ours, dim=1) * direction).sum(), leaves)
    wanted = torch.autograd.grad((torch.cat(expected, dim=1) * direction).sum(), leaves)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_frozen_weights_and_frozen_inputs_get_no_gradient() -> None:
    x_TI, downs, gates, keys_T = _tensors("malora", 9)
    gates[0].requires_grad_(False)
    _, h_TD, _ = project(x_TI, downs, gates, keys_T, SALT, P)
    h_TD.sum().backward()
    assert x_TI.grad is not None and downs[0].grad is not None and gates[0].grad is None
    _, h_TD, logits_TE = project(x_TI.detach(), downs, gates, None, SALT, P)
    (only,) = gradients(h_TD.sum() + logits_TE.sum(), downs, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(only, x_TI.detach().sum(dim=0).expand(5, 13), **CLOSE)


def test_only_the_input_and_the_weights_are_kept() -> None:
    x_TI, downs, gates, keys_T = _tensors("malora fused", 9)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        project(x_TI, downs, gates, keys_T, SALT, P)
    assert {id(tensor) for tensor in kept} == {id(tensor) for tensor in (x_TI, keys_T, *downs, *gates)}
