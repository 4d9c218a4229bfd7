"""When a run must begin to end, and how processes agree on it."""

import os
import signal
import time
from contextlib import suppress
from typing import Any

import pytest

from malora_dist.distributed.process_groups import World, gather_lists
from malora_dist.training.preemption import (
    ENOUGH_STEPS,
    TIME_IS_UP,
    Preempted,
    PreemptionCoordinator,
    deadline_of,
)
from malora_dist.training.watchdog import Watchdog, watched
from tests.multiprocess import run_distributed

# Pieces of work of a twentieth of a second each.
WORK = 1200


def test_the_earlier_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert deadline_of(None, 1000.0) is None
    assert deadline_of(0.5, 1000.0) == 1000 + 1800
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    # A tenth of what is left is kept, at most five minutes.
    monkeypatch.setenv("SLURM_JOB_END_TIME", "2000")
    assert deadline_of(None, 1000.0) == 1900 and deadline_of(0.2, 1000.0) == 1720
    monkeypatch.setenv("SLURM_JOB_END_TIME", "101000")
    assert deadline_of(None, 1000.0) == 100700 and deadline_of(100.0, 1000.0) == 100700


def test_every_signal_is_heard_and_nothing_ends() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    for number in before:
        heard: list[int] = []
        with watched(Watchdog(), 60, heard.append):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            while not heard:
                time.sleep(0.01)
        assert set(heard) == {number}
    assert {number: signal.getsignal(number) for number in before} == before


class Writer:
    """Stands for a checkpoint in flight: busy on one rank, failed on another, for some polls."""

    def __init__(self, states: list[tuple[bool, bool]]) -> None:
        self.states, self.completed = states, 0

    def progress(self) -> tuple[bool, bool]:
        return self.states.pop(0)

    def complete(self) -> None:
        self.completed += 1


def agree(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Rank 1 is busy for two polls; all complete together, at the third.
    writer = Writer([(world.rank == 1 and number < 2, False) for number in range(3)])
    writing = PreemptionCoordinator(world, background=writer)
    counts = []
    for _ in range(3):
        writing.poll()
        counts.append(writer.completed)
    found["busy"] = counts
    writer = Writer([(True, world.rank == 1)])
    PreemptionCoordinator(world, background=writer).poll()
    found["failed"] = writer.completed
    # Rank 1 alone is asked, out of step with rank 0, which learns of it soon.
    preemption = PreemptionCoordinator(world)
    found["worked"] = 0
    try:
        with preemption.while_waiting() as poll:
            if world.rank == 1:
                preemption.stop.set(signal.SIGUSR2)
                preemption.stop.set(signal.SIGTERM)
            while found["worked"] < WORK:
                found["worked"] += 1
                time.sleep(0.05)
                # Errors of its own the work may handle; a stop is none of them.
                with suppress(Exception):
                    poll()
    except Preempted as stop:
        found["reason"] = stop.reason
    # Only the main process's clock counts.
    late = PreemptionCoordinator(world, deadline=time.time() - 1 if world.is_main else None)
    try:
        late.poll()
    except Preempted as stop:
        found["late"] = stop.reason
    found["same"] = gather_lists([found["reason"]])
    return found


@pytest.mark.distributed
def test_processes_agree() -> None:
    for found in run_distributed("tests.training.test_preemption:agree", 2):
        assert found["busy"] == [0, 0, 1] and found["failed"] == 1
        # The first request stands, and neither process finishes its work.
        assert found["same"] == ["SIGUSR2", "SIGUSR2"] and found["worked"] < WORK
        assert found["late"] == "the time limit is near"
    assert Preempted(TIME_IS_UP).reason != Preempted(ENOUGH_STEPS).reason
