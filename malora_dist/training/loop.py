"""The training loop: steps, with log records, validations and checkpoints in between, and an early stop."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from malora_dist.console.log import LOGGER, time_left
from malora_dist.console.progress import Bar
from malora_dist.data.loader import MicroBatch, TrainLoader
from malora_dist.errors import TrainingError
from malora_dist.tracking.metrics import (
    AUX_LOSS,
    EXCHANGE_BYTES,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    PEAK_MEMORY_GIB,
    STEP,
    TOKENS_PER_SECOND,
    Record,
)
from malora_dist.training.preemption import ENOUGH_STEPS, Preempted
from malora_dist.training.random_state import random_state
from malora_dist.training.training_state import LoopState, TrainingParts
from malora_dist.training.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Lengths and intervals in optimizer steps; None switches an interval off."""

    max_steps: int
    steps_per_epoch: float
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    stop_after_steps: int | None


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What the loop calls; every process calls each at the same steps.

    Attributes:
        log: takes a record.
        validate: takes a step and returns the score of its validation.
        save: takes the loop's state, and whether it is the best so far.
    """

    log: Callable[[Record], None]
    validate: Callable[[int], float]
    save: Callable[[LoopState, bool], None]


def train_loop(
    parts: TrainingParts, settings: LoopSettings, state: LoopState, actions: Actions, poll: Callable[[], None]
) -> None:
    """Train from `state` to the last step, keeping `state` up to date.

    Args:
        parts: what a step changes.
        settings: lengths and intervals.
        state: where training begins.
        actions: what is logged, validated and saved with.
        poll: called before each micro-batch, by every process alike; it may raise Preempted.

    Raises:
        Preempted: after a save of the last completed step, if the run is to stop early.
    """
    loop = _Loop(parts, settings, state, actions, poll)
    try:
        with Bar("training", settings.max_steps, parts.train_step.world.is_main, after=0) as bar:
            if not state.validated:
                loop.save(best=loop.validate())
            while state.step < settings.max_steps:
                loop.step()
                bar.update(state.step)
                loop.log()
                loop.save(best=loop.validate())
                if state.step - loop.first_step == settings.stop_after_steps and state.step < settings.max_steps:
                    raise Preempted(ENOUGH_STEPS)
    except Preempted:
        if state.step > 0:
            actions.save(state, False)
        raise


class _Loop:
    def __init__(
        self,
        parts: TrainingParts,
        settings: LoopSettings,
        state: LoopState,
        actions: Actions,
        poll: Callable[[], None],
    ) -> None:
        self.parts, self.settings, self.state, self.actions, self.poll = parts, settings, state, actions, poll
        self.watchdog = parts.train_step.watchdog
        self.first_step, self.started = state.step, time.monotonic()
        state.loader, state.random = parts.loader.state_dict(), random_state()

    @property
    def is_last(self) -> bool:
        """Return whether the last step was that of the whole run."""
        return self.state.step == self.settings.max_steps

    def step(self) -> None:
        """Run one optimizer step; until it is complete the state is that of the step before."""
        began, number = time.monotonic(), self.state.step + 1
        train_step, loader = self.parts.train_step, self.parts.loader
        batches = _next(loader, self.watchdog, number, train_step.world.device)
        self.parts.step_metrics.add(train_step.run(number, batches, self.poll), time.monotonic() - began)
        self.state.step, self.state.loader, self.state.random = number, loader.state_dict(), random_state()
        self.state.validated = not (self.is_last or _due(self.settings.eval_steps, number))

    def log(self) -> None:
        """Log a record of the steps since the last one, if it is due."""
        number = self.state.step
        if number % self.settings.logging_steps == 0 or number == 1 or self.is_last:
            self.watchdog.mark_phase("logging")
            record = self.parts.step_metrics.record(number, number / self.settings.steps_per_epoch)
            self.actions.log(record)
            self._log(record)

    def validate(self) -> bool:
        """Do the validation and the routing record of this step, if they are due; return whether it is the best."""
        if self.state.validated:
            return False
        number, best = self.state.step, False
        if _due(self.settings.eval_steps, number):
            best = self.state.best.offer(self.actions.validate(number), number)
        self.watchdog.mark_phase("logging")
        self.actions.log(self.parts.step_metrics.routing(number))
        self.state.validated = True
        return best

    def save(self, best: bool) -> None:
        """Save a checkpoint, if one is due."""
        if best or self.is_last or _due(self.settings.save_steps, self.state.step):
            self.actions.save(self.state, best)

    def _log(self, record: Record) -> None:
        exchange = f"  exchanged {record[EXCHANGE_BYTES] / 2**20:.1f} MiB/step" if EXCHANGE_BYTES in record else ""
        done, total = record[STEP] - self.first_step, self.settings.max_steps - self.first_step
        logging.getLogger(LOGGER).info(
            "step %d/%d  loss %.3f  aux %.3f  grad norm %.2f  lr %.2e  %.0f tokens/s  %.2f GiB%s  left %s",
            record[STEP],
            self.settings.max_steps,
            record[LOSS],
            record[AUX_LOSS],
            record[GRAD_NORM],
            record[LEARNING_RATE],
            record[TOKENS_PER_SECOND],
            record[PEAK_MEMORY_GIB],
            exchange,
            time_left(self.started, done, total),
        )


def _next(loader: TrainLoader, watchdog: Watchdog, number: int, device: torch.device) -> list[MicroBatch]:
    watchdog.mark_phase("reading data", number)
    try:
        return [batch.to(device) for batch in next(loader)]
    except StopIteration:
        raise TrainingError(f"this process's training data ended before step {number}") from None


def _due(interval: int | None, number: int) -> bool:
    return interval is not None and number % interval == 0
