"""Runs that are told to end, killed, and started again, at random moments and in every phase, until they are finished.

Real processes and real signals. Whatever happens on the way, the end is that of a run that was never stopped, bit for
bit: its adapter, its evaluations, its records.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import pytest

from malora_dist.engine.stop import STOP_SIGNALS
from tests.e2e import SCRIPTS, deepspeed
from tests.preemption import (
    WORLD,
    Launched,
    Ranks,
    Result,
    assert_same,
    check_checkpoints,
    check_end,
    leftovers,
    make_run_folder,
    outcome,
    parent_of,
    result,
    wait_for,
)

pytestmark = pytest.mark.timeout(1200)

VARIANTS: dict[str, list[str]] = {
    "zero3": [],
    "ep2": ["--parallel.ep_size", "2", "--train.async_save", "false", "--train.save_total_limit", "2"],
}
SIGNALS, SIGNALS_OF_A_RUN, KILLS = 30, 10, 6
LIMIT = 8.0  # seconds
SETTINGS = {
    "saving": ["--parallel.timeout_seconds", "15"],
    "the limit": ["--train.max_hours", str(LIMIT / 3600)],
}


def trap(rank: int, on: str, at: str, sent: str, **where: int) -> dict[str, Any]:
    """A signal that the rank gets from itself, see tests.preemption_workers."""
    return {"rank": rank, "on": on, "at": at, "signal": sent, **where}


# What is planted in each session of one run, one after another, and after which steps it may end.
STAGES: list[tuple[str, dict[str, Any], set[int]]] = [
    # Whichever rank tokenises.
    ("tokenising", {"traps": [trap(rank, "look", "tokenising", "SIGTERM", count=2) for rank in (0, 1)]}, {0}),
    ("the base", {"traps": [trap(0, "check", "loading the base model", "SIGUSR1", count=3)]}, {0}),
    ("adapters", {"traps": [trap(1, "call", "add_adapters", "SIGUSR2")]}, {0}),
    ("DeepSpeed", {"traps": [trap(0, "phase", "starting DeepSpeed", "SIGTERM")]}, {0}),
    ("base evaluation", {"traps": [trap(1, "check", "evaluation (base)", "SIGUSR1", count=1)]}, {0}),
    ("first forward", {"traps": [trap(0, "phase", "forward", "SIGUSR2", step=1)]}, {0}),
    ("accumulation", {"traps": [trap(1, "check", "backward", "SIGTERM", step=2)]}, {1, 2}),
    ("optimizer step", {"traps": [trap(0, "phase", "optimizer step", "SIGUSR1", step=3)]}, {3}),
    ("validation", {"traps": [trap(1, "check", "evaluation (validation)", "SIGUSR2", step=4, count=1)]}, {4}),
    # Its checkpoint says that the validation is still to be done, and stays as it is.
    ("after it", {"traps": [trap(0, "phase", "forward", "SIGTERM", step=5)]}, {4}),
    # It takes longer than a collective may.
    # Before the state is restored: the run is as far as its newest checkpoint all the same.
    ("the base again", {"traps": [trap(1, "check", "loading the base model", "SIGUSR2", count=3)]}, {4}),
    ("saving", {"write_seconds": [17, 17], "while_writing": ["SIGUSR1", "SIGTERM", "SIGTERM"]}, {5, 6, 7, 8}),
    ("leaving", {"traps": [trap(1, "phase", "forward", "SIGUSR1", step=9)], "leave_seconds": 0.5}, {8}),
    ("the limit", {"traps": [{"rank": 0, "on": "check", "at": "backward", "step": 11, "sleep": LIMIT}]}, {8, 9, 10}),
    ("tuned evaluation", {"traps": [trap(1, "check", "evaluation (tuned)", "SIGUSR2", count=1)]}, {12}),
    ("the report", {"traps": [trap(0, "phase", "finishing the report", "SIGTERM")]}, {12}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("preemption"))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[Ranks]:
    started = Ranks(folder)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def whole(ranks: Ranks, folder: Path) -> dict[str, tuple[Result, float]]:
    """A run of each variant that is never stopped, and how many seconds it takes."""
    found = {}
    for variant, arguments in VARIANTS.items():
        session = ranks.start(f"whole-{variant}", [*arguments, "--output_dir", f"runs/whole-{variant}"])
        session.ready()
        began = time.monotonic()
        assert session.wait() == [0] * WORLD, session.log()
        found[variant] = result(folder / "runs" / f"whole-{variant}"), time.monotonic() - began
    return found


def draw_moments(seed: int, number: int, length: float) -> Iterator[tuple[float, int, int]]:
    """For each session the seconds to wait, the rank to be signalled, and the signal; 0 in the last, to end the run."""
    draw = random.Random(seed)
    for told in islice(cycle(STOP_SIGNALS), number):
        yield draw.uniform(0, length), draw.randrange(WORLD), told
    yield 0, 0, 0


def test_a_run_that_is_stopped_again_and_again_is_the_run_that_was_never_stopped(
    ranks: Ranks, folder: Path, whole: dict[str, tuple[Result, float]]
) -> None:
    phases: Counter[str] = Counter()
    for seed in count():
        variant = list(VARIANTS)[seed % len(VARIANTS)]
        wanted, length = whole[variant]
        run = folder / "runs" / f"chain-{seed}"
        arguments = [*VARIANTS[variant], "--output_dir", f"runs/{run.name}", "--data.cache_dir", f"cache-{seed}"]
        for number, (seconds, rank, told) in enumerate(draw_moments(seed, SIGNALS_OF_A_RUN, length)):
            session = ranks.start(f"{run.name}.{number}", arguments)
            session.ready()
            time.sleep(seconds)
            session.signal(rank, told)
            ended, heard = check_end(session, run), session.heard()
            phases.update(str(here["phase"]).split(" step-")[0] for here in heard)
            if ended["outcome"] == "finished":
                break
            assert [(here["rank"], here["code"]) for here in heard] == [(rank, told)]
            assert ended["reason"] == signal.Signals(told).name
        assert_same(run, wanted)
        if sum(phases.values()) >= SIGNALS:
            break
    print(f"{sum(phases.values())} signals, by phase: {dict(phases)}")
    assert len(phases) >= 4 and phases["forward"] + phases["backward"] > 0


@pytest.mark.usefixtures("launched")
def test_every_phase_can_be_stopped(ranks: Ranks, folder: Path, whole: dict[str, tuple[Result, float]]) -> None:
    run = folder / "runs" / "stages"
    arguments = ["--output_dir", "runs/stages", "--data.cache_dir", "cache-stages"]
    for name, plants, steps in STAGES:
        session = ranks.start(f"stages.{name}", [*arguments, *SETTINGS.get(name, [])], **plants)
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
    assert_same(run, whole["zero3"][0])


def test_a_run_whose_ranks_are_killed_is_the_run_that_was_not(
    ranks: Ranks, folder: Path, whole: dict[str, tuple[Result, float]]
) -> None:
    (wanted, length), kills = whole["zero3"], 0
    for seed in count():
        run = folder / "runs" / f"killed-{seed}"
        arguments = ["--output_dir", f"runs/{run.name}", "--parallel.timeout_seconds", "20"]
        for number, (seconds, rank, told) in enumerate(draw_moments(100 + seed, KILLS, length)):
            session = ranks.start(f"{run.name}.{number}", arguments)
            session.ready()
            time.sleep(seconds)
            session.signal(rank, signal.SIGKILL if told else 0)
            codes = session.wait()
            check_checkpoints(run)
            if codes[rank] == 0:
                break
            kills += 1
            assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, session.log()
            assert not (run / "exit.json").exists() or outcome(run)["outcome"] == "failed"
        assert_same(run, wanted)
        if kills >= KILLS:
            break
    print(f"{kills} ranks killed")


WAIT = {"on": "check", "at": "backward", "wait": True}
LAUNCHED = "tests.preemption_workers"
TORCHRUN: list[str | Path] = [SCRIPTS / "torchrun", "--standalone", "--nproc_per_node", "2", "-m", LAUNCHED]


def check_preempted(launched: Launched, run: Path, reason: str, step: int) -> None:
    """What a launched session must leave that got a signal while a rank waited in the step after this one."""
    assert launched.end() != 0, launched.log()
    ended = outcome(run)
    assert (ended["outcome"], ended["exit_code"], ended["reason"]) == ("preempted", 75, reason), launched.log()
    # The other ranks were in the collective of a check already, and heard of it in the next one.
    assert ended["step"] == check_checkpoints(run) and ended["step"] in (step, step + 1) and leftovers(run) == []


def under_torchrun(ranks: Ranks, folder: Path) -> Path:
    run, arguments = folder / "runs" / "torchrun", ["--output_dir", "runs/torchrun"]
    with Launched(TORCHRUN, folder, "torchrun.0", arguments, traps=[{"rank": 0, "step": 3, **WAIT}]) as launched:
        launched.waits()
        launched.process.terminate()
        check_preempted(launched, run, "SIGTERM", 2)
    with Launched(TORCHRUN, folder, "torchrun.1", arguments, traps=[{"rank": 0, "step": 7, **WAIT}]) as launched:
        launched.waits()
        launched.signal(1, signal.SIGUSR1)
        check_preempted(launched, run, "SIGUSR1", 6)
    assert ranks.start("torchrun.2", arguments).wait() == [0, 0]
    return run


def under_deepspeed(ranks: Ranks, folder: Path) -> Path:
    """Its launcher gives each rank 30 seconds from SIGTERM to SIGKILL, too few for the save here."""
    run, arguments = folder / "runs" / "deepspeed", ["--output_dir", "runs/deepspeed"]
    command = deepspeed(WORLD, LAUNCHED)
    with Launched(command, folder, "deepspeed.0", arguments, traps=[{"rank": 0, "step": 3, **WAIT}]) as launched:
        launched.waits()
        launched.signal(1, signal.SIGUSR1)
        check_preempted(launched, run, "SIGUSR1", 2)
    with Launched(command, folder, "deepspeed.1", arguments, write_seconds=[45, 0]) as launched:
        wait_for((run / "checkpoints" / ".step-000004.partial").exists, f"a save begins\n{launched.log()}")
        os.kill(parent_of(launched.ready()[0]), signal.SIGTERM)
        assert launched.end() != 0
    assert check_checkpoints(run) in (2, 3) and leftovers(run) and not (run / "exit.json").exists()
    assert ranks.start("deepspeed.2", arguments).wait() == [0, 0]
    assert leftovers(run) == []
    return run


@pytest.fixture(scope="module")
def launched(ranks: Ranks, folder: Path, whole: dict[str, tuple[Result, float]]) -> Iterator[dict[str, Future[Path]]]:
    """Runs under launchers, which wait most of their time, beside the other tests."""
    with ThreadPoolExecutor() as pool:
        yield {"torchrun": pool.submit(under_torchrun, ranks, folder),
               "deepspeed": pool.submit(under_deepspeed, ranks, folder)}  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_a_launcher(
    launcher: str, launched: dict[str, Future[Path]], whole: dict[str, tuple[Result, float]]
) -> None:
    assert_same(launched[launcher].result(), whole["zero3"][0])
