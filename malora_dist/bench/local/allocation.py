"""Bytes of tensors, counted exactly: what is kept, and the most that a piece of work needs on top of it."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def peak_above(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors that are alive at once while `work` runs, above those alive before it.

    On the CPU every allocation and release of PyTorch's allocator is followed, the short-lived ones inside an operation
    included; what other libraries take for themselves is not. `work` must release no tensor that it found: its size
    would not be known. On CUDA it is what the caching allocator gave out.
    The number repeats exactly: the garbage collector is off meanwhile.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        return _cuda_peak(work, device) if device.type == "cuda" else _cpu_peak(work)
    finally:
        if collects:
            gc.enable()


def _cuda_peak(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(work: Callable[[], object]) -> int:
    # The profiler's library reports each start and stop on stderr unless told.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    # A running total of the allocator: what it was before the first event is not the work's.
    events = sorted(_allocations(profiler), key=lambda event: event.start_time_ns)
    totals: list[int] = [event.extra_fields.total_allocated for event in events]
    before = totals[0] - int(events[0].extra_fields.alloc_size) if events else 0
    return max([0, *(total - before for total in totals)])


def _allocations(profiler: profile) -> Iterator[Any]:
    """Yield every allocation and release of CPU memory; the public list of events omits those inside operations."""
    from torch._C._profiler import _EventType

    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    stack: list[Any] = list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' memory; a storage that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def frozen_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the base: frozen parameters, with the scales that bitsandbytes keeps beside its 4-bit codes."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter
            state = getattr(parameter, "quant_state", None)
            yield from () if state is None else (state.absmax, state.code)


def trained_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the trainable parameters: the adapters."""
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """Yield the optimizer's moments and step counters."""
    states = () if optimizer is None else optimizer.state.values()
    yield from (value for state in states for value in state.values() if isinstance(value, Tensor))
