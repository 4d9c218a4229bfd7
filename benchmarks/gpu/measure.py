"""Time, kernels and waits of a call on this machine's device: the GPU, or the CPU to try the scripts."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")


def wait() -> None:
    """Return when the device has done all it was given."""
    if GPU:
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], repeats: int = 10, warmup: int = 3) -> float:
    """Median wall time of a call, the device's work included."""
    for _ in range(warmup):
        work()
    return _median(lambda: (work(), wait()), repeats)


def host_milliseconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median time until the call returns, the device's work not waited for: what the host needs to launch it all."""
    return _median(work, repeats)


def _median(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    wait()
    return 1e3 * sorted(times)[len(times) // 2]


@dataclass(frozen=True)
class Kernels:
    """Kernels and copies of one call: how many, their time on the device, and name, time and number of the longest."""

    number: int
    milliseconds: float
    longest: list[tuple[str, float, int]]


def kernels(work: Callable[[], Any]) -> Kernels:
    """Count and time what one call gives the GPU to do, after another one; nothing without a GPU."""
    work()
    if not GPU:
        return Kernels(0, 0.0, [])
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        wait()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.device_time / 1e3)
    longest = sorted(((name, sum(each), len(each)) for name, each in times.items()), key=lambda row: -row[1])
    return Kernels(sum(row[2] for row in longest), sum(row[1] for row in longest), longest)


def waits(work: Callable[[], Any]) -> int:
    """Count how often the host waits for the GPU in a call, as PyTorch's sync debug mode tells; 0 without a GPU."""
    if not GPU:
        work()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def peak_gib() -> float:
    """Return the most GPU memory that was allocated since the last `reset_peak`."""
    return torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0


def reset_peak() -> None:
    """Forget the most GPU memory that was allocated."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
