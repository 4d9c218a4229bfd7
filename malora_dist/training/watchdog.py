"""Where a process is in its run: step, phase and layer, for the message when it fails, hangs or is told to end."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

from torch import nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.errors import MaloraError
from malora_dist.training.preemption import STOP_SIGNALS
from malora_dist.training.process import log_error

# Said this early, the others have not given up yet; NCCL's watchdog then ends a process without a Python exception.
STUCK_SHARE = 0.9
STOP = 0


class Watchdog:
    """Optimizer step, phase and adapted layer of this process. Every change is a heartbeat.

    A process that is in no phase yet is not reported.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.step = rank, 0
        self.phase: str | None = None
        self.layer: str | None = None
        self.moved = time.monotonic()

    def mark_phase(self, phase: str, step: int | None = None) -> None:
        """Begin a phase of optimizer step `step`, of the same step as the last phase by default."""
        self.step = self.step if step is None else step
        # The gradients begin at the layer where forward ended.
        self.phase, self.layer = phase, self.layer if phase == "backward" else None
        self.moved = time.monotonic()

    def mark_layer(self, layer: str) -> None:
        """Record that forward or backward has reached an adapted layer."""
        self.layer, self.moved = layer, time.monotonic()

    def heartbeat(self) -> None:
        """Record progress within a phase."""
        self.moved = time.monotonic()

    def attach(self, model: nn.Module) -> None:
        """Mark every adapted layer that a forward of `model` reaches, recomputation included."""
        for name, layer in mixture_layers(model):
            # Before DeepSpeed's own hook, which gathers the layer and may wait for others.
            layer.register_forward_pre_hook(lambda _module, _inputs, name=name: self.mark_layer(name), prepend=True)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", near layer {self.layer}"
        return f"at step {self.step}, {self.phase}{layer}"


@contextmanager
def watched(
    watchdog: Watchdog, timeout_seconds: float, on_signal: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Report where the process is: in errors that leave this block, when nothing moves, and at SIGTERM.

    For the main thread only. An error gets the place as a note, but for mistakes that are found before step 1.

    Args:
        watchdog: where the process is.
        timeout_seconds: after which collectives fail; the report comes a tenth earlier.
        on_signal: called in another thread with each of STOP_SIGNALS, any of which ends the process if nothing moves
            from then on. By default SIGTERM ends the process.
    """
    thread = _WatchThread(watchdog, STUCK_SHARE * timeout_seconds, on_signal)
    thread.start()
    try:
        yield
    except Exception as error:
        if watchdog.phase is not None and not (isinstance(error, MaloraError) and watchdog.step == 0):
            error.add_note(f"rank {watchdog.rank} {watchdog}")
        raise
    finally:
        thread.stop()


class _WatchThread:
    """A thread that reports once where this process is when it has not moved for `limit_seconds`, and ends nothing.

    The main thread may be waiting inside PyTorch or CUDA, where Python runs no signal handler. So the thread receives
    signals through a socket. Handlers of signals are the whole process's, and so is the list of threads that have them.
    """

    active: ClassVar[list["_WatchThread"]] = []

    def __init__(self, watchdog: Watchdog, limit_seconds: float, on_signal: Callable[[int], None] | None) -> None:
        self.watchdog, self.limit_seconds, self.on_signal = watchdog, limit_seconds, on_signal
        self.stop_signal: int | None = None
        self.stopped_at = 0.0
        self._signals = STOP_SIGNALS if on_signal is not None else (signal.SIGTERM,)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Install the handlers of signals and start the thread."""
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._inbox.settimeout(self.limit_seconds / 20)
        self._old_handlers = {number: signal.signal(number, lambda _number, _frame: None) for number in self._signals}
        self._old_wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        _forget_in_children()
        self.active.append(self)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and restore the handlers."""
        self._outbox.send(bytes([STOP]))
        self._thread.join()
        self.active.remove(self)
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._inbox.close()
        self._outbox.close()

    def _run(self) -> None:
        reported = None
        while True:
            try:
                received = self._inbox.recv(64)
            except TimeoutError:
                received = b""
            if STOP in received:
                return
            for number in self._signals:
                if number in received:
                    self._on_signal(number)
            moved = self.watchdog.moved
            if moved != reported and self._is_stuck():
                reported = moved
            if self.stop_signal is not None and time.monotonic() - max(moved, self.stopped_at) >= self.limit_seconds:
                self._end(self.stop_signal)

    def _is_stuck(self) -> bool:
        """Return whether the process has not moved for too long, and report it."""
        idle = time.monotonic() - self.watchdog.moved
        if self.watchdog.phase is None or idle < self.limit_seconds:
            return False
        log_error(
            f"no progress for {idle:.0f} s: {self.watchdog}, in {_main_function()}; a process that waits longer than "
            "parallel.timeout_seconds for another one ends with an error"
        )
        return True

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGINT and self.stop_signal is None:
            log_error("Ctrl-C: the run saves and ends")
        if number == signal.SIGTERM and self.watchdog.phase is not None and self.stop_signal is None:
            log_error(f"received SIGTERM, which launchers also send when another process has failed: {self.watchdog}")
        if self.on_signal is None:
            self._end(number)
        else:
            if self.stop_signal is None:
                self.stop_signal, self.stopped_at = number, time.monotonic()
            self.on_signal(number)

    @staticmethod
    def _end(number: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + number)


@cache
def _forget_in_children() -> None:
    """Let every fork of this process call `_forget`: once, as that cannot be taken back."""
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """Keep a forked child, which shares the socket, from sending its own SIGTERM to its parent's thread."""
    if not _WatchThread.active:
        return
    _WatchThread.active.clear()
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _main_function() -> str:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
