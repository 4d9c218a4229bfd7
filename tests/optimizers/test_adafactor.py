"""transformers' Adafactor: its state to a checkpoint's tensors and back."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from malora_dist.optimizers.adafactor import ADAFACTOR

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
layout = ADAFACTOR.layout


def trained(shape: tuple[int, ...], steps: int, optimizer: Any = None, first: int = 0) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
    optimizer = ADAFACTOR.build([{"params": [parameter]}], **SETTINGS) if optimizer is None else optimizer([parameter])
    go_on(optimizer, parameter, range(first, first + steps))
    return optimizer, parameter


def go_on(optimizer: Any, parameter: nn.Parameter, steps: range) -> None:
    for number in steps:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


@pytest.mark.parametrize("shape", [(5,), (3, 5), (4, 3, 5)])
def test_goes_on_bit_by_bit(shape: tuple[int, ...]) -> None:
    optimizer, parameter = trained(shape, 3)
    names = layout.shapes(shape)
    values = layout.read(optimizer.state[parameter], 0, parameter.numel())
    assert {name: tuple(value.shape) for name, value in values.items()} == names
    assert layout.num_bytes(shape) == sum(value.nbytes for value in values.values())
    resumed, other = trained(shape, 0)
    other.data.copy_(parameter.data)
    layout.write(resumed, other, 3, {name: value.clone() for name, value in values.items()})
    go_on(optimizer, parameter, range(3, 6))
    go_on(resumed, other, range(3, 6))
    assert torch.equal(parameter, other) and resumed.state[other]["step"] == 6


def test_is_the_adafactor_of_the_trainer() -> None:
    def of_the_trainer(parameters: list[nn.Parameter]) -> Adafactor:
        return Adafactor(parameters, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)

    assert torch.equal(trained((4, 3, 5), 3)[1], trained((4, 3, 5), 3, of_the_trainer)[1])


def test_flat_parts_would_give_other_numbers() -> None:
    """The rule by which it is refused above ZeRO-0, and for slices of experts."""
    (_, whole), (_, flat) = trained((4, 3, 5), 3), trained((60,), 3)
    assert (whole.view(-1) - flat).abs().max() > 1e-3
