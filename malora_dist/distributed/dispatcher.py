"""Expert parallelism of adapted linears: tokens are sent to the ranks of their experts, and the sums back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.adapters.input_projection import ProjectedInput
from malora_dist.distributed.all_to_all import AllToAll, AsyncCombine, DispatchRows
from malora_dist.distributed.dispatch_plan import DispatchPlan, make_plan
from malora_dist.distributed.permutation import Permutation


class TokenDispatcher:
    """Dispatches the tokens of linears that read one tensor (q, k and v; gate and up) to the ranks of their experts.

    share: these linears send their tokens in one message, and not each in one of its own.
    """

    def __init__(self, all_to_all: AllToAll, share: bool = True) -> None:
        self.all_to_all, self.share = all_to_all, share

    def dispatch(self, inputs: Sequence[ProjectedInput]) -> list["DispatchedTokens"]:
        """Send each linear's tokens to the ranks of their experts, and return those that this rank receives."""
        together = [inputs] if self.share else [[each] for each in inputs]
        return [tokens for part in together for tokens in self._dispatch(part)]

    def _dispatch(self, inputs: Sequence[ProjectedInput]) -> list["DispatchedTokens"]:
        routings = [each.routing for each in inputs if each.routing is not None]
        num_experts = routings[0].probs_TE.shape[1]
        plan = make_plan([routing.expert_ids_TK for routing in routings], num_experts, self.all_to_all)
        W, stacked = len(plan.sent_WL), plan.stacked
        rows = stacked.permute(torch.cat([each.h for each in inputs]))
        gates = torch.cat([routing.gates_TE for routing in routings]).view(-1, num_experts // W)
        # A gate goes to one row at most, so that backward adds nothing up, and the order of its atomics changes no bit.
        row_gates = gates.index_select(0, stacked.token_N * W + stacked.rank_N)
        sent, received = [sum(row) for row in plan.sent_WL], [sum(row) for row in plan.received_WL]
        rows, row_gates = DispatchRows.apply(rows, row_gates, self.all_to_all, sent, received)
        return self._by_layer(rows, row_gates, plan)

    def _by_layer(self, rows: Tensor, gates: Tensor, plan: DispatchPlan) -> list["DispatchedTokens"]:
        """Give each layer its rows, which are received by source rank, then by layer."""
        L = len(plan.layers)
        sections = [count for row in plan.received_WL for count in row]
        parts, gate_parts = rows.split(sections), gates.split(sections)
        return [
            DispatchedTokens(
                rows=torch.cat(parts[layer::L]) if L > 1 else rows,
                gates=torch.cat(gate_parts[layer::L]) if L > 1 else gates,
                all_to_all=self.all_to_all,
                sent=[row[layer] for row in plan.sent_WL],
                received=[row[layer] for row in plan.received_WL],
                permutation=plan.layers[layer],
            )
            for layer in range(L)
        ]


@dataclass(frozen=True)
class DispatchedTokens:
    """One layer's tokens on the rank of their experts, and the way back.

    rows: (N', D), by source rank, then by token.
    gates: (N', E_local) fp32, 0 where an expert was not chosen.
    sent, received: rows of this layer that this rank has sent to each rank, and has received from each.
    permutation: the order of the rows that were sent.
    """

    rows: Tensor
    gates: Tensor
    all_to_all: AllToAll
    sent: list[int]
    received: list[int]
    permutation: Permutation

    def start_combine(self, sums_NO: Tensor) -> "PendingCombine":
        """Start to send the experts' sums (N', O) back to the ranks of their tokens."""
        combine = AsyncCombine(self.all_to_all, self.received, self.sent)
        return PendingCombine(combine, combine.start(sums_NO), self.permutation)


@dataclass(frozen=True)
class PendingCombine:
    """The experts' sums on their way back to the ranks of their tokens."""

    combine: AsyncCombine
    buffer: Tensor
    permutation: Permutation

    def finish(self, base_TO: Tensor) -> Tensor:
        """Wait for the sums, and return them added to the base's output (T, O)."""
        return self.permutation.unpermute(base_TO, self.combine.wait(self.buffer))
