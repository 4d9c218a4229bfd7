"""Runs that are told to end, or killed, and started again, at random moments until they are finished.

Real processes and real signals. Whatever happens on the way, the end is that of a run that was never stopped, bit for
bit: its adapter, its evaluations, its records.
"""

import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

import pytest

from malora_dist.training.preemption import STOP_SIGNALS
from tests.preemption import (
    WORLD,
    Ranks,
    Result,
    Started,
    assert_same,
    check_checkpoints,
    check_end,
    make_run_folder,
    outcome,
    whole_run,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow("runs that are stopped at many moments")]

VARIANTS: dict[str, list[str]] = {
    "zero3": [],
    "ep2": ["--parallel.ep_size", "2", "--train.async_save", "false", "--train.save_total_limit", "2"],
}
# Their first signals come in many phases, also in forward, backward and a save, and before the first one.
STOPS, KILLS = 1, 124  # seeds
Whole = tuple[Result, list[str]]


@dataclass(frozen=True)
class Moment:
    """When a rank gets a signal: soon after it has entered a phase so many times. Without a phase it gets none."""

    rank: int
    signal: int = 0
    phase: str = ""
    times: int = 0


@dataclass(frozen=True)
class Amounts:
    """How many signals are sent, and how many ranks are killed: at least, and at most at so many moments of one run.

    both: whether runs of all variants are killed, and often both ranks at once.
    """

    signals: int
    signals_of_a_run: int
    kills: int
    kills_of_a_run: int
    both: bool


@pytest.fixture(scope="module")
def amounts(pytestconfig: pytest.Config) -> Amounts:
    return Amounts(30, 10, 24, 6, True) if pytestconfig.getoption("soak") else Amounts(10, 5, 3, 3, False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(make_run_folder(tmp_path_factory.mktemp("preemption")))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def whole(ranks: Ranks) -> dict[str, Whole]:
    """A run of each variant that is never stopped."""
    return {variant: whole_run(ranks, f"whole-{variant}", arguments) for variant, arguments in VARIANTS.items()}


def draw_moments(seed: int, number: int, entered: list[str]) -> Iterator[Moment]:
    """For each session the moment of its signal; none in the last, to end the run."""
    draw, phases = random.Random(seed), ["", *sorted(set(entered))]
    for told in islice(cycle(STOP_SIGNALS), number):
        rank, phase = draw.randrange(WORLD), draw.choice(phases)
        yield Moment(rank, told, phase, draw.randint(1, max(1, min(3, entered.count(phase)))))
    yield Moment(0)


def send(session: Started, moment: Moment) -> None:
    if moment.phase:
        session.come_to(moment.rank, moment.phase, moment.times)
    if moment.signal:
        session.signal(moment.rank, moment.signal)


def test_a_run_that_is_stopped_again_and_again_is_the_run_that_was_never_stopped(
    ranks: Ranks, whole: dict[str, Whole], amounts: Amounts
) -> None:
    """Until enough signals have been heard, in at least four phases, of which one is forward or backward."""
    phases: Counter[str] = Counter()
    for seed in count(STOPS):
        variant = list(VARIANTS)[seed % len(VARIANTS)]
        wanted, entered = whole[variant]
        run = ranks.folder / "runs" / f"chain-{seed}"
        arguments = [*VARIANTS[variant], "--output_dir", f"runs/{run.name}", "--data.cache_dir", f"cache-{seed}"]
        for number, moment in enumerate(draw_moments(seed, amounts.signals_of_a_run, entered)):
            session = ranks.start(f"{run.name}.{number}", arguments)
            send(session, moment)
            ended, heard = check_end(session, run), session.heard()
            phases.update(str(here["phase"]).split(" step-")[0] for here in heard)
            if ended["outcome"] == "finished":
                break
            assert [(here["rank"], here["code"]) for here in heard] == [(moment.rank, moment.signal)]
            assert ended["reason"] == signal.Signals(moment.signal).name
        assert_same(run, wanted)
        steps = phases["forward"] + phases["backward"]
        if sum(phases.values()) >= amounts.signals and len(phases) >= 4 and steps:
            break
    print(f"{sum(phases.values())} signals, by phase: {dict(phases)}")


def test_a_run_whose_ranks_are_killed_is_the_run_that_was_not(
    ranks: Ranks, whole: dict[str, Whole], amounts: Amounts
) -> None:
    """One rank at a time, of which the other must hear; in the long form often both at once, and of each variant."""
    kills = 0
    for seed in count(KILLS):
        variant = list(VARIANTS)[(seed - KILLS) % (len(VARIANTS) if amounts.both else 1)]
        wanted, entered = whole[variant]
        run = ranks.folder / "runs" / f"killed-{seed}"
        arguments = [*VARIANTS[variant], "--output_dir", f"runs/{run.name}", "--parallel.timeout_seconds", "20"]
        draw = random.Random(seed)
        for number, moment in enumerate(draw_moments(seed, amounts.kills_of_a_run, entered)):
            session = ranks.start(f"{run.name}.{number}", arguments)
            send(session, replace(moment, signal=signal.SIGKILL if moment.signal else 0))
            both = moment.signal != 0 and amounts.both and draw.random() < 0.5
            if both:
                session.signal(1 - moment.rank, signal.SIGKILL)
            codes = session.wait()
            check_checkpoints(run)
            ended = outcome(run)["outcome"] if (run / "exit.json").exists() else "killed"
            if ended == "finished":
                break
            kills += codes.count(-signal.SIGKILL)
            assert codes[moment.rank] == -signal.SIGKILL and (both or codes[1 - moment.rank] == 1), session.log()
            assert ended in ("failed", "killed")
        assert_same(run, wanted)
        if kills >= amounts.kills:
            break
    print(f"{kills} ranks killed")
