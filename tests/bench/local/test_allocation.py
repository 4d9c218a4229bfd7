"""Known allocations, counted by hand."""

import torch
from torch import nn

from malora_dist.bench.local.allocation import (
    frozen_tensors,
    optimizer_tensors,
    peak_above,
    storage_bytes,
    trained_tensors,
)

CPU = torch.device("cpu")
KIB = 1024


def held(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_the_most_that_is_alive_at_once() -> None:
    def work() -> None:
        first = held(4)
        second = held(16)
        del first
        third = held(2)  # 18 now, 20 before
        del second, third
        held(19)

    assert peak_above(work, CPU) == 20 * KIB


def test_what_was_there_before_does_not_count_and_what_stays_does() -> None:
    before, kept = held(1000), []
    assert peak_above(lambda: kept.append(held(8)), CPU) == 8 * KIB
    assert peak_above(lambda: kept.append(held(4)), CPU) == 4 * KIB
    assert peak_above(lambda: before.zero_(), CPU) == 0
    assert peak_above(lambda: None, CPU) == 0


def test_what_is_alive_inside_an_operation_counts() -> None:
    """A sum of two dtypes is made of a copy of the narrower and the result; nobody outside ever holds the copy."""
    single, double = torch.rand(KIB), torch.rand(KIB, dtype=torch.float64)
    assert peak_above(lambda: torch.add(double, double), CPU) == 8 * KIB
    assert peak_above(lambda: torch.add(single, double), CPU) == 2 * 8 * KIB


def test_backward_counts_what_forward_keeps() -> None:
    """exp keeps its result, and gradients are made while it is alive: 3 tensors of 4 KiB, a 4-byte sum and its 1."""
    x = torch.rand(KIB, requires_grad=True)

    def work() -> None:
        x.exp().exp().sum().backward()
        x.grad = None

    # exp, exp of exp, and one gradient: that of sum is one number, expanded.
    assert peak_above(work, CPU) == 3 * 4 * KIB + 2 * 4
    assert [peak_above(work, CPU) for _ in range(3)] == [3 * 4 * KIB + 2 * 4] * 3


def test_shared_memory_counts_once() -> None:
    x = torch.empty(10, 10)
    assert storage_bytes([x, x[2:], x.T, torch.empty(3)]) == 400 + 12


def test_the_parts_of_a_trainee() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, bias=False))
    model[0].requires_grad_(False)
    assert storage_bytes(frozen_tensors(model)) == 4 * (4 * 8 + 8)
    assert storage_bytes(trained_tensors(model)) == 4 * 16
    optimizer = torch.optim.AdamW(trained_tensors(model), fused=True)
    assert storage_bytes(optimizer_tensors(optimizer)) == storage_bytes(optimizer_tensors(None)) == 0
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert storage_bytes(optimizer_tensors(optimizer)) == 2 * 4 * 16 + 4


def test_the_scales_of_bitsandbytes_count() -> None:
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    assert storage_bytes(frozen_tensors(linear)) == 64 * 64 / 2 + 4 * 64 + 4 * 16
