"""How long tests wait for processes: as long as these do something, whatever the clock says on a busy machine."""

import time
from collections.abc import Sequence

import psutil

IDLE_SECONDS = 120
# Threads that only look at a clock now and then use less of a processor than this.
PROGRESS = 0.01


class Patience:
    """Ends when processes and their children have used next to no processor time for `seconds`."""

    def __init__(self, pids: Sequence[int], seconds: float = IDLE_SECONDS) -> None:
        self.pids, self.seconds = pids, seconds
        self.used, self.since = 0.0, time.monotonic()
        self.looked = 0.0

    def is_over(self) -> bool:
        now = time.monotonic()
        if now - self.looked < 1:
            return False
        self.looked, used = now, processor_seconds(self.pids)
        if abs(used - self.used) > PROGRESS * self.seconds:
            self.used, self.since = used, now
        return now - self.since > self.seconds


def processor_seconds(pids: Sequence[int]) -> float:
    """Return the seconds of processor time of all that are there of these processes and their children."""
    total = 0.0
    for pid in pids:
        try:
            parent = psutil.Process(pid)
            for process in (parent, *parent.children(recursive=True)):
                total += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return total
