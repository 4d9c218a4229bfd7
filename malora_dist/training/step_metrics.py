"""Metrics of the steps since the last log record, and expert counts since the last routing record."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.console.log import peak_memory_gib
from malora_dist.distributed.process_groups import max_over_processes, sum_over_processes
from malora_dist.ops.devices import to_device
from malora_dist.tracking.metrics import (
    AUX_LOSS,
    EPOCH,
    EXCHANGE_BYTES,
    GRAD_NORM,
    KIND,
    LEARNING_RATE,
    LOSS,
    PEAK_MEMORY_GIB,
    ROUTING,
    SHARE,
    STEP,
    STEP_SECONDS,
    TASKS,
    TOKENS_PER_SECOND,
    TRAIN,
    Record,
    train_loss,
)
from malora_dist.training.train_step import StepResult, TrainStep


class StepMetrics:
    """Collects the results of steps and makes records of them, the same on every process."""

    def __init__(self, train_step: TrainStep) -> None:
        self.train_step = train_step
        self.layers = [name for name, layer in mixture_layers(train_step.engine.module) if layer.balanced]
        self.results: list[StepResult] = []
        self.seconds = 0.0
        self.expert_counts_GLE: Tensor = torch.zeros(())

    def add(self, result: StepResult, seconds: float) -> None:
        """Add a step, which took `seconds`."""
        self.results.append(result)
        self.seconds += seconds
        self.expert_counts_GLE = self.expert_counts_GLE + result.expert_counts_GLE

    def record(self, step: int, epoch: float) -> Record:
        """Return the record of the steps since the last one, and forget them."""
        results, seconds = self.results, self.seconds
        n = len(results)
        peak, sent, norms = self._measured()
        record: Record = {
            KIND: TRAIN,
            STEP: step,
            EPOCH: epoch,
            LOSS: sum(result.loss for result in results) / n,
            AUX_LOSS: sum(result.aux_loss for result in results) / n,
            GRAD_NORM: sum(norms) / n,
            LEARNING_RATE: results[-1].learning_rate,
            TOKENS_PER_SECOND: sum(result.tokens for result in results) / seconds,
            STEP_SECONDS: seconds / n,
            PEAK_MEMORY_GIB: peak,
        }
        if self.train_step.all_to_all is not None:
            record[EXCHANGE_BYTES] = sum(sent) / n
        for task, name in enumerate(self.train_step.task_names):
            count = sum(result.task_token_counts[task] for result in results)
            if count > 0:
                record[train_loss(name)] = sum(result.task_loss_sums[task] for result in results) / count
        self.results, self.seconds = [], 0.0
        return record

    def _measured(self) -> tuple[float, list[float], list[float]]:
        """Return the peak memory of all processes in GiB, and of each step the bytes sent and the gradient norm."""
        device, n = self.train_step.world.device, len(self.results)
        peak = max_over_processes(to_device(torch.tensor([peak_memory_gib(device)], dtype=torch.float64), device))
        sent = to_device(torch.tensor([r.exchange_bytes for r in self.results], dtype=torch.float64), device)
        norms = [r.norm.to(device, torch.float64, non_blocking=True) for r in self.results]
        highest, *values = torch.cat([peak, sum_over_processes(sent), *(norm.reshape(1) for norm in norms)]).tolist()
        return highest, values[:n], values[n:]

    def routing(self, step: int) -> Record:
        """Return the share of each task's choices that fell on each expert, by layer, and forget the counts."""
        counts_GLE = self._counts().cpu()
        self.expert_counts_GLE = torch.zeros(())
        share_GLE = counts_GLE / counts_GLE.sum(dim=-1, keepdim=True).clamp(min=1)
        tasks = list(self.train_step.task_names)
        shares = share_GLE.tolist() if self.layers else [[] for _ in tasks]
        share = {task: dict(zip(self.layers, rows, strict=True)) for task, rows in zip(tasks, shares, strict=True)}
        return {KIND: ROUTING, STEP: step, TASKS: tasks, SHARE: share}

    def _counts(self) -> Tensor:
        if not self.layers:
            return self.expert_counts_GLE
        # The counts are a transposed view, and NCCL takes contiguous tensors only.
        return sum_over_processes(self.expert_counts_GLE.clone(memory_format=torch.contiguous_format))

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON of what all processes have collected; every process must call it."""
        _, sent, norms = self._measured() if self.results else (0.0, [], [])
        results = [
            {**_numbers(result), "grad_norm": norm, "exchange_bytes": int(total)}
            for result, norm, total in zip(self.results, norms, sent, strict=True)
        ]
        counted = self.layers and self.expert_counts_GLE.dim() > 0
        return {
            "results": results,
            "seconds": self.seconds,
            "expert_counts": self._counts().tolist() if counted else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, on any number of processes: the main one then holds the sums of all."""
        is_main = self.train_step.world.is_main
        self.results = [_result(row, is_main) for row in state["results"]]
        self.seconds = state["seconds"]
        if state["expert_counts"] is not None:
            counts = torch.tensor(state["expert_counts"], device=self.train_step.world.device)
            self.expert_counts_GLE = counts if is_main else torch.zeros_like(counts)


def _numbers(result: StepResult) -> dict[str, Any]:
    """Return the fields of a result that are numbers of the host, and the same on every process."""
    other = ("expert_counts_GLE", "exchange_bytes", "norm")
    return {name: value for name, value in vars(result).items() if name not in other}


def _result(row: Mapping[str, Any], is_main: bool) -> StepResult:
    """Return the step of a row of `state_dict`."""
    numbers = {name: value for name, value in row.items() if name not in ("grad_norm", "exchange_bytes")}
    norm = torch.tensor(row["grad_norm"], dtype=torch.float64)
    sent = row["exchange_bytes"] * is_main
    return StepResult(**numbers, norm=norm, exchange_bytes=sent, expert_counts_GLE=torch.zeros(()))
