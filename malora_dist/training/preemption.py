"""Stopping a run early: by a signal or a time limit, on all processes at the same point, with everything saved."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from malora_dist.distributed.process_groups import World, broadcast_stop, max_over_control, stop_requested
from malora_dist.distributed.rank_errors import sharing_errors
from malora_dist.launch.schedulers import end_time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP, ENOUGH_STEPS = 1000, 1001
POLL_SECONDS = 0.3
# How much of a job's remaining time is kept for the last step and save, at most and at least.
KEPT_SECONDS, KEPT_SHARE = 300.0, 0.1


class Preempted(Exception):
    """Raised on every process alike when one was asked to stop early. Not a failure."""

    def __init__(self, code: int) -> None:
        reasons = {TIME_IS_UP: "the time limit is near", ENOUGH_STEPS: "train.stop_after_steps is reached"}
        self.reason = reasons[code] if code in reasons else signal.Signals(code).name
        super().__init__(self.reason)


class StopRequest:
    """The first reason for which this process is to stop. Any thread may set it; nothing happens before a poll."""

    def __init__(self) -> None:
        self.code = 0

    def set(self, code: int) -> None:
        """Ask all processes to save and stop: the number of a signal, TIME_IS_UP or ENOUGH_STEPS. The first stands."""
        self.code = self.code or code


class Background(Protocol):
    """Work beside the main thread (`training.checkpoint_saver`)."""

    def progress(self) -> tuple[bool, bool]:
        """Return whether this process is still at work, and whether it has failed."""

    def complete(self) -> None:
        """Finish the work on all processes together. Raises if it failed on one."""


@dataclass
class PreemptionCoordinator:
    """Stops all processes of a run at the same point once one of them was asked to. For the main thread only.

    Attributes:
        world: all processes.
        stop: what this process was asked.
        deadline: the `time.time()` at which this process asks all to stop; None for none.
        background: a checkpoint in flight, which `poll` completes once all its files are written.
        heartbeat: called at every poll.
    """

    world: World
    stop: StopRequest = field(default_factory=StopRequest)
    deadline: float | None = None
    background: Background | None = None
    heartbeat: Callable[[], None] = lambda: None
    _polled: float = field(default=0.0, init=False)

    def poll(self) -> None:
        """Stop if any process was asked to. To be called by every process at the same point.

        Raises:
            Preempted: on all processes, if one was asked to stop.
            CheckpointError: on all processes, if the checkpoint in flight could not be written.
        """
        self._check_deadline()
        busy, failed = self.background.progress() if self.background is not None else (False, False)
        code, any_busy, any_failed = max_over_control([self.stop.code, int(busy), int(failed)], self.world)
        if self.background is not None and (any_failed or not any_busy):
            self.background.complete()
        if code:
            self.stop.code = code
            raise Preempted(code)

    @contextmanager
    def while_waiting(self) -> Iterator[Callable[[], None]]:
        """Give a `poll` for work in which processes are not in step, as where one prepares what others wait for.

        This `poll` may be called at any time. It leaves the block soon after any process that is still in it was asked
        to stop, or has failed. All processes agree at the end of the block, which raises as `poll` and
        `sharing_errors` do.
        """
        with sharing_errors(self.world):
            try:
                yield self._poll_alone
            except _Abandoned:
                pass
            except Exception:
                with suppress(RuntimeError):
                    broadcast_stop()
                raise
        self.poll()

    def _poll_alone(self) -> None:
        now = time.monotonic()
        if now - self._polled < POLL_SECONDS:
            return
        self._polled = now
        self._check_deadline()
        if self.stop.code:
            broadcast_stop()
            raise _Abandoned
        if stop_requested():
            raise _Abandoned

    def _check_deadline(self) -> None:
        self.heartbeat()
        if self.deadline is not None and time.time() >= self.deadline:
            self.stop.set(TIME_IS_UP)


class _Abandoned(BaseException):
    """Leaves a block of `while_waiting` whose work is no longer needed.

    No Exception, as the work may handle those of its own.
    """


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
