"""A run that is told to end in every phase, one after another, and in the end is the run that was never stopped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.preemption import WORLD, Ranks, assert_same, check_end, make_run_folder, whole_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow("a run that is stopped in every phase")]

LIMIT = 8.0  # seconds


def trap(rank: int, on: str, at: str, sent: str, **where: int) -> dict[str, Any]:
    """A signal that the rank gets from itself, see tests.preemption_workers."""
    return {"rank": rank, "on": on, "at": at, "signal": sent, **where}


# What is planted in each session of one run, one after another, and after which steps it may end.
STAGES: list[tuple[str, dict[str, Any], set[int]]] = [
    # Whichever rank tokenises.
    ("tokenising", {"traps": [trap(rank, "poll alone", "tokenising", "SIGTERM", count=2) for rank in (0, 1)]}, {0}),
    ("the base", {"traps": [trap(0, "poll", "loading the base model", "SIGUSR1", count=3)]}, {0}),
    ("adapters", {"traps": [trap(1, "call", "add_adapters", "SIGUSR2")]}, {0}),
    ("DeepSpeed", {"traps": [trap(0, "phase", "starting DeepSpeed", "SIGTERM")]}, {0}),
    ("base evaluation", {"traps": [trap(1, "poll", "evaluation (base)", "SIGUSR1", count=1)]}, {0}),
    ("first forward", {"traps": [trap(0, "phase", "forward", "SIGUSR2", step=1)]}, {0}),
    ("accumulation", {"traps": [trap(1, "poll", "backward", "SIGTERM", step=2)]}, {1, 2}),
    ("optimizer step", {"traps": [trap(0, "phase", "optimizer step", "SIGUSR1", step=3)]}, {3}),
    ("validation", {"traps": [trap(1, "poll", "evaluation (validation)", "SIGUSR2", step=4, count=1)]}, {4}),
    # Its checkpoint says that the validation is still to be done, and stays as it is.
    ("after it", {"traps": [trap(0, "phase", "forward", "SIGTERM", step=5)]}, {4}),
    # Before the state is restored: the run is as far as its newest checkpoint all the same.
    ("the base again", {"traps": [trap(1, "poll", "loading the base model", "SIGUSR2", count=3)]}, {4}),
    ("saving", {"while_writing": ["SIGUSR1", "SIGTERM", "SIGTERM"]}, {5, 6, 7, 8}),
    ("leaving", {"traps": [trap(1, "phase", "forward", "SIGUSR1", step=9)], "leave_seconds": 0.5}, {8}),
    ("the limit", {"traps": [{"rank": 0, "on": "poll", "at": "backward", "step": 11, "sleep": True}]}, {8, 9, 10}),
    ("tuned evaluation", {"traps": [trap(1, "poll", "evaluation (tuned)", "SIGUSR2", count=1)]}, {12}),
    ("the report", {"traps": [trap(0, "phase", "finishing the report", "SIGTERM")]}, {12}),
]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(make_run_folder(tmp_path))
    yield started
    started.stop()


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> tuple[int, int]:
    """What a collective may take while a checkpoint is written, and what writing takes, which is longer."""
    return (15, 17) if pytestconfig.getoption("soak") else (10, 12)


def test_every_phase_can_be_stopped(ranks: Ranks, seconds: tuple[int, int]) -> None:
    run = ranks.folder / "runs" / "stages"
    wanted, _ = whole_run(ranks, "whole")
    arguments = ["--output_dir", "runs/stages", "--data.cache_dir", "cache-stages"]
    collective, writing = seconds
    slow = {"write_seconds": [writing] * WORLD, "collective_seconds": collective}
    for name, plants, steps in STAGES:
        limit = ["--train.max_hours", str(LIMIT / 3600)] if name == "the limit" else []
        also = slow if name == "saving" else {}
        session = ranks.start(f"stages.{name}", [*arguments, *limit], **plants, **also)
        ended = check_end(session, run)
        assert ended["outcome"] == ("finished" if name == "the report" else "preempted"), (name, session.log())
        assert ended["step"] in steps, (name, ended)
        heard = session.heard()
        if name == "the limit":
            assert ended["reason"] == "the time limit is near"
        elif name == "saving":
            assert len(heard) == 6
            # Of the validation that was stopped twice.
            assert (run / "checkpoints" / "best").read_text() == "step-000004\n"
        else:
            planted = plants["traps"][0]
            assert name == "tokenising" or planted["rank"] in [here["rank"] for here in heard], name
            assert name == "the report" or ended["reason"] == planted["signal"], name
    assert_same(run, wanted)
