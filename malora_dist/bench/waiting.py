"""How long a process is held up by the exchange of tokens."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from malora_dist.distributed.all_to_all import AllToAll


class Stopwatch:
    """Seconds in which the main thread stood still inside a message, summed up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class _TimedHandle:
    """The handle of a message under way, whose `wait` is timed."""

    def __init__(self, handle: Any, watch: Stopwatch) -> None:
        self.handle, self.watch = handle, watch

    def wait(self) -> None:
        with self.watch.running():
            self.handle.wait()


@contextmanager
def timed_messages(all_to_all: AllToAll | None) -> Iterator[Stopwatch]:
    """Time every message of the expert-parallel group within this block: counts, starts and waits.

    That is time of the host. With gloo it includes the wait for a slower process. On a GPU a launched message holds up
    a stream and not the host, which stands still only for the counts, and there for all kernels before them.
    """
    watch = Stopwatch()
    original = dist.all_to_all_single

    def timed(*arguments: Any, **settings: Any) -> Any:
        if all_to_all is None or settings.get("group") is not all_to_all.group:
            return original(*arguments, **settings)
        with watch.running():
            handle = original(*arguments, **settings)
        return None if handle is None else _TimedHandle(handle, watch)

    # The counts are sent without an AllToAll, so the call that all messages have in common is the one to time.
    dist.all_to_all_single = timed
    try:
        yield watch
    finally:
        dist.all_to_all_single = original
