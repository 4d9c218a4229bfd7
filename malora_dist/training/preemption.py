"""When a run ends early: signals, a time limit, and the preemption of all processes to save and leave together."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from malora_dist.distributed.process_groups import World, broadcast_stop, max_over_control, stop_requested
from malora_dist.launch.schedulers import end_time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP, ENOUGH_STEPS = 1000, 1001
LOOK_SECONDS = 0.3
# How much of a job's remaining time is kept for the last step and save, at most and at least.
KEPT_SECONDS, KEPT_SHARE = 300.0, 0.1


class Preempted(Exception):
    """Raised on every process alike when one was told to end early. Not a failure."""

    def __init__(self, code: int) -> None:
        reasons = {TIME_IS_UP: "the time limit is near", ENOUGH_STEPS: "train.stop_after_steps is reached"}
        self.reason = reasons[code] if code in reasons else signal.Signals(code).name
        super().__init__(self.reason)


class Background(Protocol):
    """Work that goes on beside the main thread (`training.checkpoint_saver`)."""

    def progress(self) -> tuple[bool, bool]:
        """Whether this process is still at it, and whether it has failed."""

    def complete(self) -> None:
        """End it on all processes together. Raises if it failed on one."""


class PreemptionCoordinator:
    """What all processes must know of each other between two pieces of work. Only the main thread may ask.

    `request` may be called from any thread; nothing happens before the main thread asks.
    """

    def __init__(self, deadline: float | None = None, alive: Callable[[], None] = lambda: None) -> None:
        """`deadline` is a `time.time()` at which this process asks all to end; `alive` is called at every look."""
        self.deadline, self.alive = deadline, alive
        self.code = 0
        self.world: World | None = None
        self.background: Background | None = None
        self._looked = 0.0

    def join(self, world: World) -> None:
        """Now the process is one of `world`."""
        self.world = world
        self.check()

    def request(self, code: int) -> None:
        """Ask all processes to save and end; the first request stands."""
        self.code = self.code or code

    def check(self) -> None:
        """Called by every process at the same point. Raises Preempted on all if one was told to end.

        A checkpoint whose files are all written is completed here; raises if one could not be written.
        """
        assert self.world is not None
        self._watch_the_clock()
        busy, failed = self.background.progress() if self.background is not None else (False, False)
        code, any_busy, any_failed = max_over_control([self.code, int(busy), int(failed)], self.world)
        if self.background is not None and (any_failed or not any_busy):
            self.background.complete()
        if code:
            self.code = code
            raise Preempted(code)

    @contextmanager
    def apart(self) -> Iterator[Callable[[], None]]:
        """For work in which processes are not in step: gives `look`, to be called often.

        `look` leaves the block on this process soon after one that is still in it was told to end; all agree at the
        block's end.
        """
        try:
            yield self._look
        except _Abandoned:
            pass
        self.check()

    def _look(self) -> None:
        assert self.world is not None
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._watch_the_clock()
        if self.code:
            broadcast_stop()
            raise _Abandoned
        if stop_requested():
            raise _Abandoned

    def _watch_the_clock(self) -> None:
        self.alive()
        if self.deadline is not None and time.time() >= self.deadline:
            self.request(TIME_IS_UP)


class _Abandoned(Exception):
    """Leaves work that is of no use any more."""


def deadline_of(max_hours: float | None, started: float) -> float | None:
    """Return when the run must begin to end, as a `time.time()`; None without a limit.

    `max_hours` after `started`, a `time.time()`, or before the scheduler ends the job: a tenth of its time is kept
    for the last step and save, at most five minutes.
    """
    limits = [] if max_hours is None else [started + 3600 * max_hours]
    end = end_time(os.environ)
    if end is not None:
        limits.append(end - min(KEPT_SECONDS, KEPT_SHARE * max(0.0, end - started)))
    return min(limits, default=None)
