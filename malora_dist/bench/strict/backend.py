"""The device type `strict` as PyTorch knows it: its name, its module `torch.strict`, and how its tensors are made."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from malora_dist.bench.strict.device import TYPE, StrictDevice, StrictTensor, copy_between, note


@cache
def register() -> torch.library.Library:
    """Make the device type known to this process, once; nothing does so at import.

    Raises RuntimeError if another package has given PyTorch's spare device type a name.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(TYPE, backend_module=_Module())
    # What is asked for where neither a mode nor a tensor of the device is seen.
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", copy_between, "PrivateUse1")
    return library


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> StrictTensor:
    return StrictTensor(torch.empty_strided(size, stride, dtype=kwargs.get("dtype"), device="cpu"))


def _empty(size: Any, **kwargs: Any) -> StrictTensor:
    return StrictTensor(torch.empty(size, dtype=kwargs.get("dtype"), device="cpu"))


class InOrder:
    """A stream or an event: there is one order of things here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.stream_id, self.cuda_stream = torch.device(TYPE, 0), 0, 0

    def __enter__(self) -> "InOrder":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "InOrder":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        note("waits", "synchronize")


class _Module:
    """`torch.strict`, as `torch.cuda`: what PyTorch, DeepSpeed and others ask of a device's module."""

    Stream = Event = InOrder

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.endswith(("memory_allocated", "memory_reserved", "memory_cached")):
            return lambda *_: 0
        raise AttributeError(f"the device {TYPE} does not imitate torch.cuda.{name}")

    def is_available(self) -> bool:
        # Outside of it others of this process, such as a DataLoader that pins memory, see no accelerator.
        return bool(StrictDevice.active)

    def is_initialized(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_call(self, call: Callable[[], Any]) -> Any:
        return call()

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, _: Any) -> None: ...

    def device(self, _: Any) -> Any:
        return nullcontext()

    device_of = stream = device

    def current_stream(self, _: Any = None) -> InOrder:
        return InOrder()

    default_stream = current_stream

    def synchronize(self, _: Any = None) -> None:
        note("waits", "synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, _: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _: Any = None) -> None:
        if state.device.type != "cpu":
            raise TypeError("the state of a generator is a host tensor")
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        # torch.manual_seed has seeded the host's generator, which draws this device's numbers too.
        ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, _: Any = None) -> None: ...

    def memory_stats(self, _: Any = None) -> dict[str, int]:
        return {}
