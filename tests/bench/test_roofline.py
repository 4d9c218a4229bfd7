"""The counts against what the real layer multiplies, and the bound of a step against a count by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import MixtureSpec, mixture_spec
from malora_dist.bench.kernels import Device, Form, Kernel, Sizes, adapter_kernels, base_kernels
from malora_dist.bench.roofline import Roofline
from malora_dist.plan.shapes import ModelShape

T, I, O, FP32 = 24, 40, 56, 4  # noqa: E741
PRODUCTS = ("base", "down", "router", "core", "up")
SPECS = {
    "lora": mixture_spec("lora", r=6),
    "molora": mixture_spec("molora", num_experts=4, r=3),
    "malora": mixture_spec("malora", num_experts=4, r=6, shared_r=8),
}
SHAPE = ModelShape(
    source="test",
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    tied_head=True,
)


class Products(TorchDispatchMode):
    """FLOPs of matrix products, and the bytes that they read and write. (torch's own counter leaves out addmm_.)"""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[1]
            # With beta = 0 the tensor to add to is not read.
            read = args[-2:] if (kwargs or {}).get("beta") == 0 else args
            self.nbytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, output))
        assert func._schema.name not in ("aten::bmm", "aten::baddbmm", "aten::addmv"), "a product not counted here"
        return output


def run_layer(spec: MixtureSpec, computation: str = "dense", dropout: float = 0.0) -> Callable[[], None]:
    """Forward and backward of the real layer."""
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(I, O, bias=False))
    inject_adapters(model, spec, ["linear"], computation=computation, lora_dropout=dropout)
    x = torch.randn(T, I, requires_grad=True)
    return lambda: model(x).backward(torch.randn(T, O))


def counted(spec: MixtureSpec, form: Form = Form()) -> list[Kernel]:  # noqa: B008
    sizes = Sizes(T, I, O, itemsize=FP32)
    return [*base_kernels(sizes), *adapter_kernels(spec, sizes, form)]


@pytest.mark.parametrize(
    ("name", "computation", "form"),
    [
        ("lora", "dense", Form()),
        ("lora", "dense", Form(eager=True)),
        ("molora", "dense", Form()),
        ("malora", "dense", Form()),
        ("malora", "dense", Form(router="fp32")),
        ("malora", "dense", Form(router="joined", fused=True)),
        ("malora", "dense", Form(router="ours", fused=True)),
        ("malora", "grouped", Form(router="ours", chosen_rows=True)),
        ("malora", "grouped", Form(chosen_rows=True)),
        ("malora", "grouped", Form(chosen_rows=True, late_gates=True)),
        ("molora", "grouped", Form(chosen_rows=True)),
    ],
)
def test_flops_are_those_the_layer_multiplies(name: str, computation: str, form: Form) -> None:
    run = run_layer(SPECS[name], computation)
    with Products() as counter:
        run()
    products = [kernel for kernel in counted(SPECS[name], form) if kernel.part in PRODUCTS]
    assert sum(kernel.flops for kernel in products) == counter.flops


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("name", "router"), [("lora", "apart"), ("malora", "ours"), ("molora", "fp32")])
def test_bytes_are_those_the_products_touch(name: str, router: str, dropout: float) -> None:
    """Of the forms that bear a method's plain name: each product of the formula is one of the layer's."""
    run, form = run_layer(SPECS[name], dropout=dropout), Form(router=router, dropout=dropout > 0)
    with Products() as counter:
        run()
    products = [kernel for kernel in counted(SPECS[name], form) if kernel.part in PRODUCTS]
    assert sum(kernel.nbytes for kernel in products) == counter.nbytes


def test_what_the_forms_of_malora_move() -> None:
    """By hand: the router's reads of x, a fused linear's share of them, and K rows permuted and back."""
    moved = {
        form: sum(kernel.nbytes for kernel in counted(SPECS["malora"], form)) / FP32
        for form in (
            Form(),
            Form(router="fp32"),
            Form(router="joined"),
            Form(router="ours"),
            Form(chosen_rows=True),
            Form(chosen_rows=True, late_gates=True),
        )
    }
    plain = moved[Form()]
    # In fp32 the copy of x is one more tensor, written and read in place of x.
    assert moved[Form(router="fp32")] - plain == 2 * T * I
    # x once less forward and for the weights, dx read and written once less.
    assert plain - moved[Form(router="joined")] == (1 + 2 + 1) * T * I
    # The copy forward, and no second read of x nor of dx backward.
    assert moved[Form(router="ours")] - plain == 2 * T * I - (2 + 1) * T * I
    K = SPECS["malora"].top_k
    late = moved[Form(chosen_rows=True, late_gates=True)] - moved[Form(chosen_rows=True)]
    assert late == 2 * T * O + K * T * O - 5 * K * T * SPECS["malora"].r
    sizes = Sizes(T, I, O, itemsize=FP32, sharing=3)
    joined = [
        sum(k.nbytes for k in adapter_kernels(SPECS["malora"], sizes, Form(router="joined", fused=s)))
        for s in (False, True)
    ]
    assert (joined[0] - joined[1]) / FP32 == pytest.approx((1 + 2 + 1) * T * I * 2 / 3)
    ours = [
        sum(k.nbytes for k in adapter_kernels(SPECS["malora"], sizes, Form(router="ours", fused=s)))
        for s in (False, True)
    ]
    # And of the copy: read, written, and read again.
    assert (ours[0] - ours[1]) / FP32 == pytest.approx((1 + 2 + 1 + 3) * T * I * 2 / 3)


def test_what_dropout_moves() -> None:
    """x twice, the mask's gradient; a stored mask is a byte a number; fused linears have one dropped input."""
    sizes = Sizes(T, I, O, sharing=3)

    def moved(form: Form) -> float:
        kernels = adapter_kernels(SPECS["lora"], sizes, form)
        return sum(kernel.nbytes for kernel in kernels if kernel.part == "dropout")

    assert moved(Form()) == 0
    assert moved(Form(dropout=True)) == (2 + 3 + 2) * T * I * 2
    assert moved(Form(dropout=True, eager=True)) == (2 + 2) * T * I * 2 + 2 * T * I
    assert 3 * moved(Form(dropout=True, fused=True)) == moved(Form(dropout=True))


def test_the_step_by_hand() -> None:
    tokens, length = 64, 32
    roofline = Roofline(SHAPE, tokens, length, Device(flops=1e12, bandwidth=1e30))
    subjects = {subject.name: subject for subject in roofline.subjects()}
    linears = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160)
    attention = 3 * (1 + 2.5) * 4 * (tokens * length / 2) * 64
    expected = 2 * 2 * tokens * (linears + 64 * 100) + attention
    base = roofline.step_kernels(subjects["base"])
    assert sum(kernel.count * kernel.flops for kernel in base) == expected
    # With endless bandwidth the bound is computing alone, with endless FLOP/s moving alone.
    assert roofline.seconds(base) == pytest.approx(expected / 1e12)
    moving = Roofline(SHAPE, tokens, length, Device(flops=1e30, bandwidth=1e9))
    assert moving.seconds(base) == pytest.approx(sum(kernel.count * kernel.nbytes for kernel in base) / 1e9)


def test_a_mask_costs_all_pairs_of_a_row() -> None:
    """By hand, of 3 layers of 64-wide heads: T^2 against T length / 2 pairs; T^2 of the mask and k and v of 4 heads."""
    tokens, length = 64, 32
    device = Device(flops=1e12, bandwidth=1e9)
    varlen, sdpa, alone = (
        [k for k in Roofline(SHAPE, tokens, n, device, attention=a).step_kernels(base) if k.part == "attention"]
        for a, n in (("varlen", length), ("sdpa", length), ("sdpa", tokens))
        for base in (Roofline(SHAPE, tokens, n, device).subjects()[0],)
    )
    assert [kernel.count for kernel in sdpa] == [3, 3]
    assert sdpa[0].flops - varlen[0].flops == 4 * (tokens**2 - tokens * length / 2) * 64
    assert sdpa[0].nbytes - varlen[0].nbytes == 2 * (tokens**2 + tokens * 2 * 2 * 16)
    assert alone[0].flops == 4 * tokens**2 / 2 * 64 and alone[0].nbytes == varlen[0].nbytes


def test_a_4_bit_base_is_unpacked_twice() -> None:
    sizes = Sizes(T, 64, 128)
    added = [kernel for kernel in base_kernels(sizes, nf4=True) if kernel.part == "unpack"]
    assert [kernel.phase for kernel in added] == ["forward", "dx"]
    assert {kernel.nbytes for kernel in added} == {64 * 128 / 2 + 4 * 64 * 128 / 64 + 2 * 64 * 128}
