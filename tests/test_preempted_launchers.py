"""Runs that are told to end under real launchers, and go on as the run that was never stopped."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e import SCRIPTS, deepspeed
from tests.preemption import (
    WORLD,
    Launched,
    Ranks,
    Result,
    assert_same,
    check_checkpoints,
    leftovers,
    make_run_folder,
    outcome,
    parent_of,
    whole_run,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow("real launchers, of which deepspeed gives its ranks 30 seconds to end")]

WAIT = {"on": "poll", "at": "backward", "wait": True}
LAUNCHED = "tests.preemption_workers"
TORCHRUN: list[str | Path] = [SCRIPTS / "torchrun", "--standalone", "--nproc_per_node", "2", "-m", LAUNCHED]


def check_preempted(launched: Launched, run: Path, reason: str, step: int) -> None:
    """What a launched session must leave that got a signal while a rank waited in the step after this one."""
    assert launched.end() != 0, launched.log()
    ended = outcome(run)
    assert (ended["outcome"], ended["exit_code"], ended["reason"]) == ("preempted", 75, reason), launched.log()
    # The other ranks were in the collective of a check already, and heard of it in the next one.
    assert ended["step"] == check_checkpoints(run) and ended["step"] in (step, step + 1) and leftovers(run) == []


def under_torchrun(folder: Path) -> Path:
    run, arguments = folder / "runs" / "torchrun", ["--output_dir", "runs/torchrun"]
    with Launched(TORCHRUN, folder, "torchrun.0", arguments, traps=[{"rank": 0, "step": 3, **WAIT}]) as launched:
        launched.waits()
        launched.process.terminate()
        check_preempted(launched, run, "SIGTERM", 2)
    with Launched(TORCHRUN, folder, "torchrun.1", arguments, traps=[{"rank": 0, "step": 7, **WAIT}]) as launched:
        launched.waits()
        launched.signal(1, signal.SIGUSR1)
        check_preempted(launched, run, "SIGUSR1", 6)
    return run


def under_deepspeed(folder: Path) -> Path:
    """Its launcher gives each rank 30 seconds from SIGTERM to SIGKILL, too few for the save here."""
    run, arguments = folder / "runs" / "deepspeed", ["--output_dir", "runs/deepspeed"]
    command = deepspeed(WORLD, LAUNCHED)
    with Launched(command, folder, "deepspeed.0", arguments, traps=[{"rank": 0, "step": 3, **WAIT}]) as launched:
        launched.waits()
        launched.signal(1, signal.SIGUSR1)
        check_preempted(launched, run, "SIGUSR1", 2)
    with Launched(command, folder, "deepspeed.1", arguments, write_seconds=[300, 0]) as launched:
        launched.wait_for((run / "checkpoints" / ".step-000004.partial").exists, "begins a save")
        os.kill(parent_of(launched.ready()[0]), signal.SIGTERM)
        assert launched.end() != 0
    assert check_checkpoints(run) in (2, 3) and leftovers(run) and not (run / "exit.json").exists()
    return run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(make_run_folder(tmp_path_factory.mktemp("launchers")))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def whole(ranks: Ranks) -> Result:
    return whole_run(ranks, "whole")[0]


@pytest.fixture(scope="module")
def stopped(ranks: Ranks, whole: Result) -> dict[str, Path]:
    """A run under each launcher that was stopped; side by side, for they wait most of their time."""
    with ThreadPoolExecutor() as pool:
        runs = {"torchrun": pool.submit(under_torchrun, ranks.folder),
                "deepspeed": pool.submit(under_deepspeed, ranks.folder)}  # fmt: skip
        return {launcher: run.result() for launcher, run in runs.items()}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_a_launcher(launcher: str, ranks: Ranks, stopped: dict[str, Path], whole: Result) -> None:
    run = stopped[launcher]
    session = ranks.start(f"{launcher}.2", ["--output_dir", f"runs/{launcher}"])
    assert session.wait() == [0] * WORLD, session.log()
    assert leftovers(run) == []
    assert_same(run, whole)
