"""The context that parts of a run are handed: it does not change, and what is derived from it stops with it."""

import signal
from dataclasses import FrozenInstanceError

import pytest
import torch

from malora_dist.config import load_config
from malora_dist.distributed.process_groups import World
from malora_dist.training.preemption import PreemptionCoordinator
from malora_dist.training.run_context import RunContext
from malora_dist.training.watchdog import Watchdog
from tests.config.recipes import RECIPES

CONFIG, WORLD = load_config(RECIPES / "demo.yaml"), World(0, 1, 0, torch.device("cpu"))


class Writer:
    """Stands for a checkpoint in flight."""

    def progress(self) -> tuple[bool, bool]:
        return True, False

    def complete(self) -> None:
        pytest.fail("not written yet")


def test_what_is_written_in_the_background_belongs_to_another_context_that_stops_alike() -> None:
    context, writer = RunContext(CONFIG, WORLD, Watchdog(), PreemptionCoordinator(WORLD, deadline=7.0)), Writer()
    saving = context.with_background(writer)
    assert context.preemption is not None and saving.preemption is not None
    assert (context.preemption.background, saving.preemption.background) == (None, writer)
    context.preemption.stop.set(signal.SIGUSR1)
    saving.preemption.stop.set(signal.SIGTERM)
    assert saving.preemption.stop.code == context.preemption.stop.code == signal.SIGUSR1
    assert saving.preemption.deadline == 7.0 and saving.watchdog is context.watchdog
    with pytest.raises(FrozenInstanceError):
        context.preemption = None  # type: ignore[misc]


def test_without_preemption_a_poll_is_a_heartbeat() -> None:
    watchdog = Watchdog()
    watchdog.moved = 0.0
    RunContext(CONFIG, WORLD, watchdog).poll()
    assert watchdog.moved > 0 and watchdog.phase is None
