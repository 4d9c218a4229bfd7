"""Real runs in which one rank fails in its second step; `train` is a rank of one.

`python -m tests.training.hang_workers CASE ARGUMENTS` is one under a launcher.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import malora_dist.train
import malora_dist.training.setup
from malora_dist.adapters.input_projection import FusedProjection
from malora_dist.data.loader import MicroBatch, TrainLoader
from malora_dist.training import process
from malora_dist.training.watchdog import Watchdog

GATE, UP = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))


def sleep_long() -> None:
    time.sleep(3600)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_the_router() -> None:
    def broken(*_: Any) -> None:
        raise ValueError("only this router fails")

    # gate_proj and up_proj are fused.
    FusedProjection.forward = broken  # type: ignore[assignment]


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


# What the last rank does in which phase of step 2, at which layer; `save` is the main rank's.
FAULTS: dict[str, tuple[str, str | None, Callable[[], None]]] = {
    "killed": ("backward", UP, kill_itself),
    "router": ("forward", GATE, break_the_router),
    "sleeper": ("forward", UP, sleep_long),
    "save": ("saving step-000002", None, fill_the_disk),
}


class FaultyWatchdog(Watchdog):
    """The place of a rank, at one of which a fault waits."""

    def __init__(self, rank: int, case: str) -> None:
        super().__init__(rank)
        faulty = 0 if case == "save" else int(os.environ["WORLD_SIZE"]) - 1
        self.where, self.at, self.fault = FAULTS.get(case, ("", None, sleep_long))
        self.where = self.where if rank == faulty else ""

    def mark_phase(self, phase: str, step: int | None = None) -> None:
        super().mark_phase(phase, step)
        self._fail_here()

    def mark_layer(self, layer: str) -> None:
        super().mark_layer(layer)
        self._fail_here()

    def _fail_here(self) -> None:
        if (self.step, self.phase, self.layer) == (2, self.where, self.at):
            self.fault()


class FaultyLoader(TrainLoader):
    """Has no batches on the last rank for step 2, or one too few."""

    case = ""

    def __next__(self) -> list[MicroBatch]:
        first, batches = self._consumed == 0, super().__next__()
        if first or self._rank + 1 < self._world_size or self.case not in ("ended", "short"):
            return batches
        if self.case == "ended":
            raise StopIteration
        return batches[:-1]


def train(case: str, arguments: list[str]) -> int:
    """A run in which the fault waits."""
    FaultyLoader.case = case
    process.PATIENCE_SECONDS = 2
    malora_dist.train.Watchdog = partial(FaultyWatchdog, case=case)  # type: ignore[assignment, misc]
    malora_dist.training.setup.TrainLoader = FaultyLoader  # type: ignore[misc]
    return malora_dist.train.main(arguments)


if __name__ == "__main__":
    case, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(train(case, arguments))
