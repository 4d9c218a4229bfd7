"""Operators of torch.library on the device: one launch each, whatever their CPU form computes with."""

import pytest
import torch
from torch import Tensor

from malora_dist.bench.strict.device import StrictDevice


@torch.library.custom_op("strict_test::halves", mutates_args=(), device_types="cpu")
def halves(x_TI: Tensor, y_TI: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two halves of x + y, by several operations."""
    total_TI = x_TI * 1.0 if y_TI is None else x_TI + y_TI
    low, high = total_TI.chunk(2, dim=1)
    return low.contiguous(), high.contiguous()


def _backward(ctx: object, grad_low: Tensor, grad_high: Tensor) -> tuple[Tensor, None]:
    return torch.cat([grad_low, grad_high], dim=1), None


halves.register_autograd(_backward)


@torch.library.custom_op("strict_test::scale_", mutates_args=("x_TI", "rest"), device_types="cpu")
def scale_(x_TI: Tensor, rest: list[Tensor], by_T: Tensor) -> None:
    """Each row of x and of the rest times its factor, in place."""
    for each in (x_TI, *rest):
        each.copy_(each * by_T[:, None])


LIBRARY = torch.library.Library("strict_plain", "DEF")
LIBRARY.define("add_rows_(Tensor(a!) x, Tensor[] rows, float by) -> Tensor(a!)")


def _add_rows(x_TI: Tensor, rows: list[Tensor], by: float) -> Tensor:
    for row in rows:
        x_TI.add_(row * by)
    return x_TI


LIBRARY.impl("add_rows_", _add_rows, "CPU")


class AddRows(torch.autograd.Function):
    """x + 2 * the rows, by an operator without a gradient of its own."""

    @staticmethod
    def forward(ctx: object, x_TI: Tensor, row_I: Tensor) -> Tensor:
        total: Tensor = torch.ops.strict_plain.add_rows_(x_TI.clone(), [row_I, row_I], 1.0)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].sum(dim=0) * 2


def test_an_operator_is_one_launch_and_may_have_several_outputs(strict: StrictDevice) -> None:
    x_TI = torch.arange(8.0).view(2, 4).to("strict").requires_grad_()
    strict.counts.reset()
    low, high = halves(x_TI)
    assert strict.counts.launches == {"strict_test.halves.default": 1} and not strict.counts.waits
    assert {low.device.type, high.device.type} == {"strict"}
    assert low.tolist() == [[0, 1], [4, 5]] and high.tolist() == [[2, 3], [6, 7]]
    (low * 2 + high).sum().backward()
    assert x_TI.grad is not None and x_TI.grad.tolist() == 2 * [[2, 2, 1, 1]]


def test_an_operator_changes_its_arguments(strict: StrictDevice) -> None:
    x_TI, rest = torch.ones(2, 3, device="strict"), torch.ones(2, 1, device="strict")
    version = x_TI._version
    strict.counts.reset()
    scale_(x_TI[:, 1:], [rest], torch.arange(2.0, device="strict"))
    assert strict.counts.launches["strict_test.scale_.default"] == 1
    assert not any(name.startswith("aten.copy_") for name in strict.counts.launches)
    assert x_TI.tolist() == [[1, 0, 0], [1, 1, 1]] and rest.tolist() == [[0], [1]]
    assert x_TI._version > version


def test_an_operator_of_a_library_returns_the_argument_it_changed(strict: StrictDevice) -> None:
    x_TI, row_I = torch.ones(2, 3, device="strict"), torch.ones(3, device="strict", requires_grad=True)
    changed = torch.ops.strict_plain.add_rows_(x_TI, [row_I.detach()], 4.0)
    assert changed is x_TI and x_TI.tolist() == 2 * [3 * [5]]
    strict.counts.reset()
    AddRows.apply(x_TI, row_I).sum().backward()
    assert strict.counts.launches["strict_plain.add_rows_.default"] == 1
    assert row_I.grad is not None and row_I.grad.tolist() == 3 * [4]


@pytest.mark.parametrize("stranger", [torch.ones(2, 4), torch.ones(())])
def test_an_operator_takes_no_host_tensor(strict: StrictDevice, stranger: Tensor) -> None:
    with pytest.raises(RuntimeError, match="strict_test.halves.default: Expected all tensors to be on the same device"):
        halves(torch.ones(2, 4, device="strict"), stranger)


def test_an_operator_in_inference_mode(strict: StrictDevice) -> None:
    with torch.inference_mode():
        low, _ = halves(torch.ones(2, 4, device="strict"))
        assert low.device.type == "strict"
        scale_(low, [], torch.zeros(2, device="strict"))
        assert low.tolist() == 2 * [[0, 0]]


def test_bitsandbytes_is_one_launch_an_operator(strict: StrictDevice) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64)
    packed, state = quantize_4bit(weight.to("strict"), quant_type="nf4")
    assert packed.device.type == state.absmax.device.type == "strict"
    strict.counts.reset()
    found = dequantize_4bit(packed, state)
    assert strict.counts.launches["bitsandbytes.dequantize_4bit.default"] == 1
    wanted = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    assert torch.equal(found.cpu(), wanted)
