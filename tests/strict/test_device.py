"""What CUDA allows and refuses, waits for and launches, said of the device; from PyTorch's documented behaviour."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.bench.strict.backend import register
from malora_dist.bench.strict.device import StrictDevice


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    register()
    with StrictDevice(watch="tests") as device:
        yield device


def dev(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, device="strict", dtype=dtype)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
        call()
    return str(error.value)


def test_devices_do_not_mix(device: StrictDevice) -> None:
    for call in (
        lambda: dev(3) + torch.ones(3),
        lambda: torch.ones(3).add_(dev(3)),
        lambda: torch.ones(()).add_(dev(())),
        lambda: torch.cat([dev(3), torch.ones(3)]),
        lambda: torch.stack([dev(()), torch.ones(())]),
        lambda: dev(3, 3) @ torch.ones(3, 3),
        lambda: dev(3).index_select(0, torch.tensor([0])),
        lambda: dev(3).gather(0, torch.tensor([0])),
        lambda: F.embedding(torch.tensor([0]), dev(3, 3)),
        lambda: torch.ones(3)[dev(1, dtype=torch.int64)],
        lambda: dev(3).masked_fill_(torch.ones(3, dtype=torch.bool), 0.0),
        lambda: torch.where(torch.ones(3, dtype=torch.bool), dev(3), dev(3)),
        lambda: torch.add(dev(()), dev(()), out=torch.ones(())),
    ):
        assert "device" in refused(call)


def test_what_may_be_on_the_host(device: StrictDevice) -> None:
    assert (dev(3) + torch.ones(())).device.type == "strict"
    assert (torch.zeros(()) + dev(3)).device.type == "strict"
    assert (torch.zeros(()) + dev(())).device.type == "strict"
    assert dev(3)[torch.tensor([0, 1])].shape == (2,)
    assert dev(3)[torch.tensor([True, False, True])].shape == (2,)
    assert dev(3).masked_fill(dev(3, dtype=torch.bool), torch.tensor(2.0)).tolist() == [2, 2, 2]
    x = dev(3)
    x[torch.tensor([0])] = torch.tensor(5.0)
    assert x.tolist() == [5, 1, 1]
    x.copy_(torch.zeros(3))
    assert torch.ones(3).copy_(x).tolist() == [0, 0, 0]


def test_a_generator_is_of_the_device_it_fills(device: StrictDevice) -> None:
    refused(lambda: torch.empty(3, device="strict").uniform_(generator=torch.Generator("cpu")))
    refused(lambda: torch.randn(3, device="strict", generator=torch.Generator("cpu")))
    torch.empty(3).uniform_(generator=torch.Generator("cpu"))
    with torch.device("strict"):
        assert torch.empty(3).device.type == "strict"


def test_random_numbers_are_those_of_the_cpu(device: StrictDevice) -> None:
    torch.manual_seed(0)
    wanted = torch.randn(3).tolist()
    torch.manual_seed(0)
    assert torch.randn(3, device="strict").tolist() == wanted


def test_the_host_cannot_read_and_integers_have_no_products(device: StrictDevice) -> None:
    refused(lambda: dev(3).numpy())
    refused(lambda: np.asarray(dev(3)))
    refused(lambda: dev(3, 3, dtype=torch.int64) @ dev(3, 3, dtype=torch.int64))


def test_whole_numbers_have_histograms(device: StrictDevice) -> None:
    numbers = torch.tensor([3, 0, 3, 1], dtype=torch.int32, device="strict")
    found = torch.histc(numbers, bins=4, min=0, max=3)
    assert (found.dtype, found.tolist()) == (torch.int32, [1, 1, 0, 2])


def test_complex_numbers_have_gradients(device: StrictDevice) -> None:
    """Which are products with conjugates, that are conjugated as they are read."""
    pairs = torch.arange(1.0, 5.0, device="strict").view(2, 2).requires_grad_()
    turns = torch.polar(torch.ones(2), torch.tensor([0.5, 1.0])).to("strict")
    torch.view_as_real(torch.view_as_complex(pairs) * turns).sum().backward()
    wanted = torch.view_as_real(torch.tensor([1 + 1j, 1 + 1j]) * turns.cpu().conj())
    torch.testing.assert_close(pairs.grad.cpu(), wanted)  # type: ignore[union-attr]
    assert torch.view_as_real(turns.conj()).tolist() == torch.view_as_real(turns.cpu().conj().resolve_conj()).tolist()


def test_only_host_memory_is_pinned(device: StrictDevice) -> None:
    assert "pin" in refused(lambda: dev(3).pin_memory())
    assert not dev(3).is_pinned() and not torch.ones(3).is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    pinned = torch.arange(3.0).pin_memory()
    assert pinned.is_pinned() and pinned.tolist() == [0, 1, 2]
    assert pinned.to("strict", non_blocking=True).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("waits", "call"),
    [
        (1, lambda x: x.sum().item()),
        (1, lambda x: bool(x.sum() > 0)),
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (0, lambda x: x.to("cpu", non_blocking=True)),
        (1, lambda x: torch.tensor([1.0], device="strict")),
        (1, lambda x: torch.ones(3).to("strict")),
        (0, lambda x: torch.ones(3).to("strict", non_blocking=True)),
        (0, lambda x: x.to(torch.bfloat16)),
        (1, lambda x: x.nonzero()),
        (0, lambda x: torch.nonzero_static(x, size=3)),
        (1, lambda x: x[x > 0]),
        (0, lambda x: x[torch.ones(1, dtype=torch.int64, device="strict")]),
        (1, lambda x: x[torch.tensor([0])]),
        (0, lambda x: x.masked_fill(x > 0, 0.0)),
        (1, lambda x: torch.bincount(x.long())),
        (1, lambda x: torch.repeat_interleave(x, x.long())),
        (0, lambda x: torch.repeat_interleave(x, x.long(), output_size=3)),
        (0, lambda x: x.repeat_interleave(2)),
        (1, lambda x: torch.equal(x, x)),
        (1, lambda x: torch.linalg.svd(x[None])),
        (0, lambda x: x.sort(stable=True)),
        (0, lambda x: x.cumsum(0)),
        (0, lambda x: x.sum() * 2),
        (0, lambda x: torch._assert_async((x < 9).all())),
        (1, lambda x: torch.strict.synchronize()),  # type: ignore[attr-defined]
    ],
)
def test_waits(device: StrictDevice, waits: int, call: Callable[[Tensor], Any]) -> None:
    x = dev(3)
    device.counts.reset()
    call(x)
    assert sum(device.counts.waits.values()) == waits, device.counts.report()


def test_training_counts_launches_and_not_views(device: StrictDevice) -> None:
    linear = torch.nn.Linear(4, 4).to("strict")
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    x = dev(3, 4)
    device.counts.reset()
    linear(x).view(-1).sum().backward()
    optimizer.step()
    counts = device.counts
    assert counts.launches["aten.addmm.default"] == 1 and "aten.view.default" not in counts.launches
    assert not counts.waits and not counts.atomics
    # x, weight, bias and the output.
    assert counts.nbytes["aten.addmm.default"] == 4 * (12 + 16 + 4 + 12)
    assert linear.weight.grad is not None and linear.weight.grad.device.type == "strict"


def test_a_count_names_the_line(device: StrictDevice) -> None:
    x = dev(3)
    device.counts.reset()
    x.tolist()
    ((kind, name, place),) = [key for key in device.counts.places if key[0] == "waits"]
    assert name == "tolist" and place.startswith("strict/test_device.py:")
    assert f"tolist at {place}" in device.counts.report()


def test_sums_without_an_order(device: StrictDevice) -> None:
    dev(3).index_add_(0, torch.zeros(2, dtype=torch.int64, device="strict"), dev(2))
    assert device.counts.totals()["atomics"] == 1


def test_data_can_be_replaced(device: StrictDevice) -> None:
    parameter = torch.nn.Parameter(dev(4))
    parameter.data = torch.zeros(2, 2, device="strict")
    assert parameter.shape == (2, 2) and float((parameter.detach() + 1).sum()) == 4


def test_inference_mode(device: StrictDevice) -> None:
    with torch.inference_mode():
        x = dev(3).to(torch.float64)
        assert (x.to("strict", torch.float32).reshape(3, 1) @ dev(1, 3)).sum().item() == 9
        assert "device" in refused(lambda: x + torch.ones(3))


def test_registering_again_changes_nothing() -> None:
    assert register() is register()
