"""The balance loss of optimizer steps, and the counts of chosen experts that it is computed from.

With scope `global` it is the loss of all tokens of a step, E * sum_e f_e P_e, however they are dealt to processes and
micro-batches. The share f_e of choices that fell on expert e is known only after the last forward of the step, when
most gradients have been made; it has no gradient of its own, and the gradient takes it from the step before. The first
step has none before it and takes f_e = 1/E, which pulls nowhere. The loss that is reported has the step's own f.
With scope `local` each micro-batch of each process has a loss of its own, as most trainers have it.

The z-loss (ST-MoE, arXiv 2202.08906) keeps the logits of routers small: the mean over all tokens of the step of
log(sum_e exp(l_e))^2. It is a mean over tokens, so it needs nothing of other processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.input_projection import FusedProjection, InputProjection
from malora_dist.data.loader import MicroBatch
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.ops.balance import (
    ExpertStatistics,
    balance_of_shares,
    choice_shares,
    expert_statistics,
)
from malora_dist.ops.devices import to_device
from malora_dist.ops.routing import Routing


@dataclass(frozen=True)
class BalanceSettings:
    """How router statistics become a loss.

    scope: `global` or `local`. reduction over routers: `mean` or `sum`.
    schedule: the coefficient is `constant`, falls in a `linear` way to 0 after `last_step`, or is 0 `until` then.
    z_coefficient: of the z-loss.
    """

    coefficient: float
    reduction: str
    scope: str
    schedule: str = "constant"
    last_step: int = 0
    z_coefficient: float = 0.0

    def coefficient_at(self, step: int) -> float:
        """Return the balance loss's coefficient in an optimizer step, from 1."""
        if self.schedule == "constant":
            return self.coefficient
        if self.schedule == "linear":
            return self.coefficient * max(0.0, 1 - (step - 1) / self.last_step)
        return self.coefficient if step <= self.last_step else 0.0


def take_statistics(model: nn.Module, batch: MicroBatch, num_tasks: int) -> ExpertStatistics | None:
    """Return the statistics of the last forward by task; None if no layer has anything to balance.

    Layers whose tokens use every expert are not among the L. Of a layer that is called several times, as some models
    repeat their layers, choices are counted in all calls, and probabilities are means over them. Call once after each
    forward: it takes all that layers keep of their routing away. Raises ConfigError for a layer that the forward did
    not call for each token.
    """
    task_T = batch.task_ids[batch.token_sample]
    layers = [(name, layer) for name, layer in mixture_layers(model) if layer.routed]
    taken = [(layer.balanced, _take_routings(name, layer, len(task_T))) for name, layer in layers]
    routings = [calls for balanced, calls in taken if balanced]
    if not routings:
        return None
    statistics = expert_statistics([each for calls in routings for each in calls], task_T, num_tasks)
    return _of_layers(statistics, [len(calls) for calls in routings])


def keep_log_sums(model: nn.Module, keep: bool) -> None:
    """Let the routers of a model keep what the z-loss needs, or not."""
    for module in model.modules():
        if isinstance(module, InputProjection | FusedProjection):
            module.keeps_log_sums = keep


def _of_layers(statistics: ExpertStatistics, calls: list[int]) -> ExpertStatistics:
    """Combine the statistics of several calls of one layer."""
    if max(calls) == 1:
        return statistics
    counts = [part_GCE.sum(dim=1) for part_GCE in statistics.counts_GLE.split(calls, dim=1)]
    prob_sums = [part_CE.mean(dim=0) for part_CE in statistics.prob_sum_LE.split(calls)]
    squares = statistics.square_sum_L
    if squares is not None:
        squares = torch.stack([part_C.mean() for part_C in squares.split(calls)])
    return ExpertStatistics(torch.stack(counts, dim=1), torch.stack(prob_sums), squares)


def _take_routings(name: str, layer: Any, tokens: int) -> list[Routing]:
    """Return the routing of each call of a layer in the last forward."""
    last = [] if layer.routing is None else [layer.routing]
    routings: list[Routing] = layer.routings or last
    layer.routing = layer.routings = None
    if not routings:
        raise ConfigError(
            f"adapter.target_modules: {name} is adapted, but this model's forward never calls it (it may read the "
            "weight itself, or be a part for something else than text); leave it out"
        )
    for routing in routings:
        if len(routing.expert_ids_TK) != tokens:
            raise ConfigError(
                f"adapter.target_modules: {name} reads {len(routing.expert_ids_TK)} rows of a micro-batch of {tokens} "
                "tokens, and cannot be balanced with the others; leave it out"
            )
    return routings


class StepBalance:
    """Computes each micro-batch's share of the step's balance loss; all shares add up to the loss that is trained on.

    Every process has one. `start`, then `add` after each forward; `sums`, added up over the processes, go to `finish`.
    """

    def __init__(
        self, model: nn.Module, settings: BalanceSettings, num_tasks: int, world_size: int, device: torch.device
    ) -> None:
        self.model, self.settings, self.num_tasks, self.world_size = model, settings, num_tasks, world_size
        balanced = [(name, layer) for name, layer in mixture_layers(model) if layer.balanced]
        self.layers = [name for name, _ in balanced]
        self.num_experts = balanced[0][1].num_experts if balanced else 0
        self._zeros_LE = torch.zeros(len(self.layers), self.num_experts, dtype=torch.float64, device=device)
        self._zero = self._zeros_LE.new_zeros(())
        keep_log_sums(model, settings.z_coefficient > 0)
        self._before(self._zeros_LE)
        self.start(torch.ones((), dtype=torch.float64, device=device), 1)

    def start(self, tokens: Tensor, micro_batches: int) -> None:
        """Begin a step of so many tokens on all processes, and so many micro-batches on this one."""
        self.tokens, self.micro_batches = tokens, micro_batches
        self.counts_GLE = self._zeros_LE.float().expand(self.num_tasks, -1, -1)
        self._prob_sum_LE, self._local = self._zeros_LE, self._zero
        if self.layers:
            # Of one token's probabilities.
            self._weight_LE = (self._shares_before_LE / tokens).float()

    def add(self, batch: MicroBatch) -> Tensor:
        """Return the share of the micro-batch whose forward has ended; its share of the z-loss is in `z_share`."""
        statistics = take_statistics(self.model, batch, self.num_tasks)
        self.z_share = self._zero
        if statistics is None:
            return self._zero.float()
        if statistics.square_sum_L is not None:
            self.z_share = self._reduce(statistics.square_sum_L) / self.tokens.to(statistics.square_sum_L.dtype)
        prob_sum_LE = statistics.prob_sum_LE
        self.counts_GLE = self.counts_GLE + statistics.counts_GLE
        self._prob_sum_LE = self._prob_sum_LE + prob_sum_LE.detach()
        if self.settings.scope == "global":
            return self._reduce(balance_of_shares(self._weight_LE, prob_sum_LE))
        counts_LE = statistics.counts_GLE.sum(dim=0)
        share = self._reduce(balance_of_shares(choice_shares(counts_LE), prob_sum_LE / len(batch.token_sample)))
        share = share / (self.world_size * self.micro_batches)
        self._local = self._local + share.detach()
        return share

    def sums(self) -> Tensor:
        """Return what this process has counted, an fp64 vector of the same length on every one."""
        if not self.layers:
            return self._zeros_LE.flatten()
        return torch.cat([self._local.reshape(1), self.counts_GLE.sum(dim=0).flatten(), self._prob_sum_LE.flatten()])

    def finish(self, sums: Tensor) -> Tensor:
        """End the step, given all processes' `sums` added up: its balance loss, a number on the device."""
        if not self.layers:
            return self._zero
        counts_LE, prob_sum_LE = sums[1:].view(2, *self._zeros_LE.shape)
        self._before(counts_LE)
        if self.settings.scope == "local":
            return sums[0]
        mean_prob_LE = prob_sum_LE / self.tokens
        return self._reduce(balance_of_shares(self._shares_before_LE, mean_prob_LE))

    def _before(self, counts_LE: Tensor) -> None:
        """Keep these as the choices of all tokens in the step before."""
        self._counts_before_LE, self._shares_before_LE = counts_LE, choice_shares(counts_LE)

    def _reduce(self, losses_L: Tensor) -> Tensor:
        return losses_L.mean() if self.settings.reduction == "mean" else losses_L.sum()

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON of what the next step needs from this one, the same on every process."""
        return {"expert_counts": [[int(count) for count in row] for row in self._counts_before_LE.tolist()]}

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Restore what `state_dict` gave. Raises CheckpointError, naming `source`, if it is not of these layers."""
        counts = state.get("expert_counts")
        L, E = self._zeros_LE.shape
        fits = isinstance(counts, list) and len(counts) == L and all(_are_counts(row, E) for row in counts)
        if not fits:
            raise CheckpointError(f"{source}: state.balance.expert_counts must be {L} lists of {E} counts")
        found = torch.tensor(counts, dtype=torch.float64).view(L, E)
        self._before(to_device(found, self._zeros_LE.device))


def _are_counts(row: Any, number: int) -> bool:
    return isinstance(row, list) and len(row) == number and all(type(count) is int and count >= 0 for count in row)
