"""The 4-bit base and the initial values on the device: the bytes of the CPU, few launches, and no wait."""

import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.bench.strict.device import StrictDevice
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.nf4 import dequantize_nf4, quantize_nf4


def _weight(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(97, 130, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_has_the_same_bytes(strict: StrictDevice, double_quant: bool) -> None:
    for weight in (_weight(), _weight(torch.float32)):
        packed = quantize_nf4(weight.to("strict"), double_quant)
        assert packed.device.type == "strict" and torch.equal(packed.cpu(), quantize_nf4(weight, double_quant))


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("double_quant", [False, True])
def test_unpacking_starts_few_kernels_and_never_waits(strict: StrictDevice, double_quant: bool, offset: int) -> None:
    weight = _weight()[:96, :128]
    packed = quantize_nf4(weight, double_quant)
    packed = torch.cat([packed.new_zeros(offset), packed]).to("strict")[offset:]
    dequantize_nf4(packed, (96, 128), torch.bfloat16, double_quant)  # the first makes the device's tables
    strict.counts.reset()
    dequantize_nf4(packed, (96, 128), torch.bfloat16, double_quant)
    scales = ["bitsandbytes.dequantize_blockwise.default", "aten.add_.Tensor"] if double_quant else []
    copies = ["aten.clone.default"] if offset else []  # fp32 numbers that are not aligned
    wanted = [*copies, *scales, "bitsandbytes.dequantize_4bit.default"]
    assert strict.counts.launches == dict.fromkeys(wanted, 1) and not strict.counts.waits

    layer = NF4Linear(packed, torch.ones(96, dtype=torch.bfloat16, device="strict"), 128, 96, double_quant)
    x = torch.ones(5, 128, dtype=torch.bfloat16, device="strict", requires_grad=True)
    gradient = torch.ones(5, 96, dtype=torch.bfloat16, device="strict")
    strict.counts.reset()
    layer(x).backward(gradient)
    products = {"aten.addmm.default": 1, "aten.mm.default": 1}
    assert strict.counts.launches == {**dict.fromkeys(wanted, 2), **products} and not strict.counts.waits


@pytest.mark.parametrize("method", ["malora", "molora", "dora"])
def test_adapters_have_the_same_initial_values(strict: StrictDevice, method: str) -> None:
    spec = mixture_spec(method, num_experts=3, r=2, shared_r=5) if method == "malora" else mixture_spec(method, r=2)
    values = []
    for device in ("cpu", "strict"):
        model = nn.Sequential(NF4Linear(quantize_nf4(_weight()).to(device), None, 130, 97, False))
        inject_adapters(model, spec, ["0"], seed=3)
        values.append([(name, parameter.device.type, parameter.cpu()) for name, parameter in adapter_parameters(model)])
    for (name, _, on_host), (other, kind, on_device) in zip(*values, strict=True):
        assert (name, kind) == (other, "strict") and torch.equal(on_host, on_device), name
