"""bitsandbytes' AdamW8bit: its state to a checkpoint's tensors and back, in the same blocks and in others."""

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from malora_dist.optimizers.adamw_8bit import ADAMW_8BIT, BLOCK, SMALLEST, quantise

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
layout = ADAMW_8BIT.layout


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gradients over many magnitudes, some of them 0, and a stretch of 600 that gets none."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        gradient = torch.randn(shape, generator=draw) * 10 ** (4 * torch.rand(shape, generator=draw) - 4)
        gradient.view(-1)[1000:1600] = 0
        found.append(gradient)
    return found


def trained(shape: tuple[int, ...], steps: int) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
    optimizer = ADAMW_8BIT.build([{"params": [parameter]}], **SETTINGS)
    for gradient in gradients(shape, steps):
        step(optimizer, parameter, gradient)
    return optimizer, parameter


def step(optimizer: Any, parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient.clone()
    optimizer.step()


def whole(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    found = layout.read(optimizer.state[parameter], 0, parameter.numel())
    return {name: found[name].view(shape).clone() for name, shape in layout.shapes(tuple(parameter.shape)).items()}


@pytest.mark.parametrize("shape", [(7, 11), (3, 41, 67), (SMALLEST,)])
def test_the_same_blocks_go_on_bit_by_bit(shape: tuple[int, ...]) -> None:
    optimizer, parameter = trained(shape, 3)
    other = nn.Parameter(parameter.detach().clone())
    resumed = ADAMW_8BIT.build([{"params": [other]}], **SETTINGS)
    layout.write(resumed, other, 3, whole(optimizer, parameter))
    for gradient in gradients(shape, 3):
        step(optimizer, parameter, gradient)
        step(resumed, other, gradient)
    assert torch.equal(parameter, other) and resumed.state[other]["step"] == 6
    for name, tensor in whole(optimizer, parameter).items():
        assert torch.equal(tensor, whole(resumed, other)[name]), name


def test_a_range_is_that_of_the_whole() -> None:
    optimizer, parameter = trained((3, 41, 67), 2)
    for name, tensor in layout.read(optimizer.state[parameter], 300, 5000).items():
        assert torch.equal(tensor, whole(optimizer, parameter)[name].view(-1)[300:5000])


def test_moments_are_those_that_bitsandbytes_reads() -> None:
    optimizer, parameter = trained((3, 41, 67), 2)
    state, found = optimizer.state[parameter], whole(optimizer, parameter)
    for moment, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        quant_state = bitsandbytes.functional.QuantState(
            state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCK, dtype=torch.float32
        )
        wanted = bitsandbytes.functional.dequantize_blockwise(state[f"state{number}"], quant_state)
        torch.testing.assert_close(found[moment], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_other_blocks_are_quantised_as_well_as_bitsandbytes_does(signed: bool) -> None:
    optimizer, parameter = trained((3, 41, 67), 3)
    moment = "exp_avg" if signed else "exp_avg_sq"
    book = optimizer.name2qmap["dynamic" if signed else "udynamic"]
    found = whole(optimizer, parameter)
    value, absmax = (found[name].view(-1)[1700:] for name in (moment, f"{moment}_absmax"))
    codes, scales = quantise(value, absmax, book)
    wanted, state = bitsandbytes.functional.quantize_blockwise(value, code=book, blocksize=BLOCK)
    torch.testing.assert_close(scales, state.absmax, rtol=1e-6, atol=0)
    scale = scales[torch.arange(len(value)) // BLOCK]
    error, its_error = ((book[each.long()] * scale - value).abs() for each in (codes, wanted))
    assert (error <= its_error + 1e-6 * scale).all() and (error <= 0.01 * scale).all()


def test_small_tensors_stay_fp32_and_can_join_large_ones() -> None:
    optimizer, parameter = trained((7, 11), 2)
    found = whole(optimizer, parameter)
    assert not found["exp_avg_absmax"].any() and found["exp_avg"].any()
    codes, scales = quantise(found["exp_avg"].view(-1), found["exp_avg_absmax"].view(-1), book := book_of(optimizer))
    assert scales == found["exp_avg"].abs().max()
    error = (book[codes.long()] * scales - found["exp_avg"].view(-1)).abs().max()
    assert error <= 0.01 * scales


def book_of(optimizer: Any) -> Tensor:
    book: Tensor = optimizer.name2qmap["dynamic"]
    return book


@pytest.mark.parametrize("shape", [(7, 11), (3, 41, 67), (SMALLEST,), (SMALLEST - 1,)])
def test_bytes(shape: tuple[int, ...]) -> None:
    optimizer, parameter = trained(shape, 1)
    state = optimizer.state[parameter]
    held = sum(tensor.nbytes for key, tensor in state.items() if key.startswith(("state", "absmax")))
    assert layout.num_bytes(shape) == held
