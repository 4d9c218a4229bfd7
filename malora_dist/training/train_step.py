"""One optimizer step over all processes, with a loss that does not depend on which process got which samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.training_mode import train_adapters
from malora_dist.data.loader import MicroBatch
from malora_dist.distributed.all_to_all import AllToAll
from malora_dist.distributed.process_groups import World, max_over_control, sum_over_processes
from malora_dist.distributed.zero012 import clip_gradients
from malora_dist.errors import NonFiniteError, TrainingError
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.ops.devices import to_device
from malora_dist.ops.loss import batch_counts, sum_by_group, target_weights
from malora_dist.ops.products import kept_weight_copies
from malora_dist.training.balance_loss import BalanceSettings, StepBalance
from malora_dist.training.deepspeed_engine import base_learning_rate
from malora_dist.training.nonfinite_check import NonFiniteCheck, first_nonfinite_layer, stop_if_nonfinite
from malora_dist.training.task_conflict import TaskConflict
from malora_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class StepResult:
    """The result of a step, equal on every process except for `expert_counts_GLE` and `exchange_bytes`.

    Attributes:
        norm: L2 norm of all gradients before clipping, on the device, which may still compute it.
        tokens: of the global batch, prompts included.
        expert_counts_GLE: choices of each expert by task and layer, on this process.
        exchange_bytes: bytes that this process sent to others for expert parallelism.
    """

    loss: float
    aux_loss: float
    norm: Tensor
    learning_rate: float
    tokens: int
    task_loss_sums: list[float]
    task_token_counts: list[float]
    expert_counts_GLE: Tensor
    exchange_bytes: int = 0

    @property
    def grad_norm(self) -> float:
        """Return `norm` on the host; waits for the device."""
        return float(self.norm)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step computes, clips and reports.

    Attributes:
        task_names: names of the tasks, by their number.
        balance: the balance loss.
        normalization: of the loss, see `ops.loss.target_weights`.
        zero_stage: that of the engine.
        max_grad_norm: the norm to which gradients are clipped.
        seed: of dropout masks.
        task_conflict: `project` takes conflicts of tasks out of the gradients of S_A, `none` adds them up.
    """

    task_names: Sequence[str]
    balance: BalanceSettings
    normalization: str
    zero_stage: int
    max_grad_norm: float
    seed: int
    task_conflict: str = "none"


class TrainStep:
    """Runs optimizer steps on an engine.

    loss = sum of weighted cross-entropies over the whole global batch (`ops.loss`) + coefficient x its balance
    loss, and the z-loss if it has one (`training.balance_loss`). DeepSpeed divides by the accumulation steps and
    averages over processes, so each process back-propagates its weighted sum times both. The host waits for the device
    once a step, when the numbers that must be finite are read.
    """

    def __init__(
        self,
        engine: Any,
        world: World,
        settings: StepSettings,
        *,
        all_to_all: AllToAll | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.engine, self.world, self.settings, self.all_to_all = engine, world, settings, all_to_all
        self.task_names = settings.task_names
        self.watchdog = watchdog or Watchdog(world.rank)
        self.watchdog.attach(engine.module)
        self.balance = StepBalance(engine.module, settings.balance, len(self.task_names), world.size, world.device)
        projects = settings.task_conflict == "project"
        self.conflict = TaskConflict(engine.module, len(self.task_names), world) if projects else None
        self.trained = [p for _, p in adapter_parameters(engine.module) if p.requires_grad]
        self.nonfinite = NonFiniteCheck(engine.module, world.device, self.watchdog.mark_layer)

    def run(self, number: int, batches: Sequence[MicroBatch], poll: Callable[[], None] = lambda: None) -> StepResult:
        """Run one optimizer step.

        Args:
            number: of the step, from 1.
            batches: this process's micro-batches.
            poll: called before each micro-batch; what it raises leaves the step undone.

        Raises:
            TrainingError: on every process alike, if a loss or gradient is not finite or if the processes have
                different numbers of micro-batches; the weights are then still those of the step before.
        """
        self.watchdog.mark_phase("counting tokens", number)
        _need_equal(number, len(batches), self.world)
        self.engine.train()
        train_adapters(self.engine.module)
        self.nonfinite.clear()
        sent_before = self._sent_bytes()
        step_counts = self._step_counts(batches)
        self.balance.start(step_counts.tokens, len(batches))
        learning_rate = base_learning_rate(self.engine.optimizer)
        sums = _Sums(len(self.task_names), self.world.device)
        with kept_weight_copies(self.engine.module):
            for batch in batches[:-1]:
                poll()
                self._backward(number, batch, step_counts, len(batches), sums)
                self.engine.step()
            poll()
            self._backward(number, batches[-1], step_counts, len(batches), sums)
        self.watchdog.mark_phase("optimizer step")
        totals = self._check(number, batches, sums, step_counts)
        if self.conflict is not None:
            self.conflict.apply()
        norm = clip_gradients(self.trained, self.settings.max_grad_norm) if self.settings.zero_stage == 0 else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return StepResult(
            loss=totals.loss,
            aux_loss=totals.aux_loss,
            norm=torch.as_tensor(norm, dtype=torch.float64),
            learning_rate=learning_rate,
            tokens=int(totals.tokens),
            task_loss_sums=totals.task_loss_sums,
            task_token_counts=totals.task_token_counts,
            expert_counts_GLE=self.balance.counts_GLE,
            exchange_bytes=self._sent_bytes() - sent_before,
        )

    def _sent_bytes(self) -> int:
        return 0 if self.all_to_all is None else self.all_to_all.total_bytes

    def _step_counts(self, batches: Sequence[MicroBatch]) -> "_StepCounts":
        G = len(self.task_names)
        counts = torch.zeros(G + 2, dtype=torch.float64)
        for batch in batches:
            counts[: G + 1] += batch_counts(batch.tasks_and_targets, G)
            counts[G + 1] += batch.input_ids.numel()
        counts = sum_over_processes(to_device(counts, self.world.device))
        return _StepCounts(counts[: G + 1], counts[G + 1])

    def _backward(
        self, number: int, batch: MicroBatch, step_counts: "_StepCounts", accumulation: int, sums: "_Sums"
    ) -> None:
        self.watchdog.mark_phase("forward")
        set_token_keys(self.engine.module, batch, self.settings.seed, number)
        if self.conflict is not None:
            self.conflict.start(batch)
        ce_N = cross_entropies(self.engine, batch)
        balance = self.balance.add(batch)
        weights_N = target_weights(
            batch.target_sample,
            batch.task_ids,
            batch.target_counts,
            step_counts.supervised,
            self.settings.normalization,
        )
        loss = (ce_N * weights_N).sum()
        settings = self.balance.settings
        share = loss + settings.coefficient_at(number) * balance
        if settings.z_coefficient > 0:
            share = share + settings.z_coefficient * self.balance.z_share
        self.watchdog.mark_phase("backward")
        self.engine.backward(share * accumulation * self.world.size)
        self.nonfinite.collect()
        sums.add(batch, ce_N.detach(), loss.detach())

    def _check(
        self, number: int, batches: Sequence[MicroBatch], sums: "_Sums", step_counts: "_StepCounts"
    ) -> "_Totals":
        """Add the step's sums up over all processes and read them on the host; raises if one is not finite."""
        own = [sums.vector(), self.nonfinite.norms_P, self.balance.sums()]
        losses, norms, balance = sum_over_processes(torch.cat(own)).split([len(part) for part in own])
        aux, tokens = self.balance.finish(balance).reshape(1), step_counts.tokens.reshape(1)
        G = len(self.task_names)
        aux_loss, loss, *rest = torch.cat([aux, losses, norms, step_counts.supervised[:-1], tokens]).tolist()
        totals = _Totals(loss, aux_loss, rest[:G], rest[-G - 1 : -1], rest[-1])
        stop_if_nonfinite(
            number,
            (loss, aux_loss),
            totals.task_loss_sums,
            self.task_names,
            where=lambda: first_nonfinite_layer(
                self.engine, batches, self.world.device, seed=self.settings.seed, step=number
            ),
        )
        layer = self.nonfinite.first_bad_layer(rest[G : -G - 1])
        if layer is not None:
            tasks = sorted({self.task_names[t] for batch in batches for t in batch.task_ids.tolist()})
            raise NonFiniteError(
                f"a gradient is not finite at step {number}, first in layer {layer}; tasks here: {', '.join(tasks)}"
            )
        return totals


def _need_equal(number: int, micro_batches: int, world: World) -> None:
    """Raise TrainingError unless all processes have as many micro-batches: later, the others would wait for one.

    Compared between hosts, so that no process waits for its device.
    """
    own = [micro_batches if rank == world.rank else 0 for rank in range(world.size)]
    ranks: dict[int, list[int]] = {}
    for rank, count in enumerate(max_over_control(own, world)):
        ranks.setdefault(count, []).append(rank)
    if len(ranks) > 1:
        found = ", ".join(f"{count} on rank {' '.join(map(str, which))}" for count, which in sorted(ranks.items()))
        raise TrainingError(f"step {number} needs the same number of micro-batches on every process; there are {found}")


@dataclass(frozen=True)
class _StepCounts:
    supervised: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class _Totals:
    """A step's sums over all processes, on the host."""

    loss: float
    aux_loss: float
    task_loss_sums: list[float]
    task_token_counts: list[float]
    tokens: float


class _Sums:
    """Running sums of a step on this process, on the device; `TrainStep._check` adds them up over processes."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.task_loss_G = torch.zeros(num_tasks, dtype=torch.float64, device=device)

    def add(self, batch: MicroBatch, ce_N: Tensor, loss: Tensor) -> None:
        """Add a micro-batch: cross-entropies of its targets, and its part of the loss."""
        self.loss += loss
        self.task_loss_G += sum_by_group(ce_N, batch.task_ids[batch.target_sample], len(self.task_loss_G))

    def vector(self) -> Tensor:
        """Return the sums as one vector (1 + G,)."""
        return torch.cat([self.loss.reshape(1), self.task_loss_G])
