"""The training loop: steps, log records, evaluation and saves in between."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malora_dist.data.loader import MicroBatch
from malora_dist.engine.position import Position
from malora_dist.engine.progress import LOGGER, Bar, peak_memory_gib, time_left
from malora_dist.engine.step import Stepper, StepResult
from malora_dist.errors import TrainingError
from malora_dist.nn.inject import mixture_layers
from malora_dist.parallel.groups import max_over_processes, sum_over_processes

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Lengths and intervals, in optimizer steps; None switches an interval off."""

    max_steps: int
    steps_per_epoch: float
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    stop_after_steps: int | None

    @property
    def last_step(self) -> int:
        return min(self.max_steps, self.stop_after_steps or self.max_steps)


def train_loop(
    stepper: Stepper,
    loader: Iterator[Sequence[MicroBatch]],
    settings: LoopSettings,
    *,
    log: Callable[[Record], None],
    evaluate: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """Train to the last step. `log`, `evaluate` and `save` are called by every process at the same steps."""
    world, started = stepper.world, time.monotonic()
    window = _Window(stepper)
    with Bar("training", settings.last_step, world.is_main) as bar:
        for number in range(1, settings.last_step + 1):
            began = time.monotonic()
            batches = _next(loader, stepper.position, number, world.device)
            window.add(stepper.step(number, batches), time.monotonic() - began)
            bar.update(number)
            last = number == settings.last_step
            if number % settings.logging_steps == 0 or number == 1 or last:
                stepper.position.enter("logging")
                record = window.close(number, number / settings.steps_per_epoch)
                log(record)
                _say(record, started, settings)
            if _due(settings.eval_steps, number):
                evaluate(number)
            if _due(settings.save_steps, number) and not last:
                save(number)
            if last or _due(settings.eval_steps, number):
                stepper.position.enter("logging")
                log(window.routing(number))


def _next(
    loader: Iterator[Sequence[MicroBatch]], position: Position, number: int, device: torch.device
) -> list[MicroBatch]:
    position.enter("reading data", number)
    try:
        return [batch.to(device) for batch in next(loader)]
    except StopIteration:
        raise TrainingError(f"this process's training data ended before step {number}") from None


def _due(interval: int | None, number: int) -> bool:
    return interval is not None and number % interval == 0


def _say(record: Record, started: float, settings: LoopSettings) -> None:
    exchange = f"  exchanged {record['exchange_bytes'] / 2**20:.1f} MiB/step" if "exchange_bytes" in record else ""
    logging.getLogger(LOGGER).info(
        "step %d/%d  loss %.3f  aux %.3f  grad norm %.2f  lr %.2e  %.0f tokens/s  %.2f GiB%s  left %s",
        record["step"],
        settings.last_step,
        record["loss"],
        record["aux_loss"],
        record["grad_norm"],
        record["learning_rate"],
        record["tokens_per_second"],
        record["peak_memory_gib"],
        exchange,
        time_left(started, record["step"], settings.last_step),
    )


class _Window:
    """Sums over the steps since the last log record, and expert counts since the last routing record."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.layers = [name for name, layer in mixture_layers(stepper.engine.module) if layer.routed]
        self.results: list[StepResult] = []
        self.seconds = 0.0
        self.expert_counts_GLE: Tensor = torch.zeros(())

    def add(self, result: StepResult, seconds: float) -> None:
        self.results.append(result)
        self.seconds += seconds
        self.expert_counts_GLE = self.expert_counts_GLE + result.expert_counts_GLE

    def close(self, step: int, epoch: float) -> Record:
        """The window's record, the same on every process; starts a new window."""
        results, seconds = self.results, self.seconds
        n = len(results)
        device = self.stepper.world.device
        peak = max_over_processes(torch.tensor([peak_memory_gib(device)], dtype=torch.float64, device=device))
        record: Record = {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "loss": sum(result.loss for result in results) / n,
            "aux_loss": sum(result.aux_loss for result in results) / n,
            "grad_norm": sum(result.grad_norm for result in results) / n,
            "learning_rate": results[-1].learning_rate,
            "tokens_per_second": sum(result.tokens for result in results) / seconds,
            "step_seconds": seconds / n,
            "peak_memory_gib": float(peak),
        }
        if self.stepper.wire is not None:
            sent = torch.tensor([sum(result.exchange_bytes for result in results)], dtype=torch.float64, device=device)
            record["exchange_bytes"] = float(sum_over_processes(sent)) / n
        for task, name in enumerate(self.stepper.task_names):
            count = sum(result.task_token_counts[task] for result in results)
            if count > 0:
                record[f"train/{name}/loss"] = sum(result.task_loss_sums[task] for result in results) / count
        self.results, self.seconds = [], 0.0
        return record

    def routing(self, step: int) -> Record:
        """Share of each task's choices that went to each expert, by layer; starts a new count."""
        counts = sum_over_processes(self.expert_counts_GLE.clone()) if self.layers else self.expert_counts_GLE
        self.expert_counts_GLE = torch.zeros(())
        share = {
            name: {
                layer: (counts[task, index] / counts[task, index].sum().clamp(min=1)).tolist()
                for index, layer in enumerate(self.layers)
            }
            for task, name in enumerate(self.stepper.task_names)
        }
        return {"kind": "routing", "step": step, "tasks": list(self.stepper.task_names), "share": share}
