"""Expert parallelism of adapted linears: tokens travel to the ranks that own their experts, sums travel home."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.protocols import AddExperts
from malora_dist.adapters.shared_input import SharedInput
from malora_dist.distributed.all_to_all import AllToAll, Combine, Homeward, SendRows, Spread
from malora_dist.distributed.dispatch_plan import Positions, Routes, make_routes
from malora_dist.ops.routing import Routing


@dataclass(frozen=True)
class Arrived:
    """One layer's rows at their owner, and the way back to their tokens.

    rows (N', D), by home rank, then by token; gates (N', E_local) fp32, 0 where an expert was not chosen. `sent` rows
    go home to each rank, `received` come from each owner, in the order of `home`.
    """

    rows: Tensor
    gates: Tensor
    sent: list[int]
    received: list[int]
    home: Positions


def send_rows(h: Sequence[Tensor], routings: Sequence[Routing], all_to_all: AllToAll) -> list[Arrived]:
    """Bring tokens of L layers to their owners: h[l] (T, D) with routing over all experts -> rows at the owner.

    All layers share one exchange of counts and one of rows.
    """
    num_experts = routings[0].probs_TE.shape[1]
    routes = make_routes([routing.expert_ids_TK for routing in routings], num_experts, all_to_all.group)
    all_to_all.count("counts", [1] * len(routes.sent_WL), len(h) * 8)
    W = len(routes.sent_WL)
    stacked = routes.stacked
    rows = Spread.apply(torch.cat(list(h)), stacked.token_N, stacked.slots_TQ)
    gates = torch.cat([routing.gates_TE for routing in routings]).view(-1, num_experts // W)
    # A gate goes to one row at most, so that backward adds nothing up, and the order of its atomics changes no bit.
    row_gates = gates.index_select(0, stacked.token_N * W + stacked.owner_N)
    sent, received = [sum(row) for row in routes.sent_WL], [sum(row) for row in routes.received_WL]
    rows, row_gates = SendRows.apply(rows, row_gates, all_to_all, sent, received)
    return _by_layer(rows, row_gates, routes)


def _by_layer(rows: Tensor, gates: Tensor, routes: Routes) -> list[Arrived]:
    """Rows arrive by home rank, then by layer; each layer gets its own."""
    L = len(routes.layers)
    sections = [count for row in routes.received_WL for count in row]
    parts, gate_parts = rows.split(sections), gates.split(sections)
    return [
        Arrived(
            rows=torch.cat(parts[layer::L]) if L > 1 else rows,
            gates=torch.cat(gate_parts[layer::L]) if L > 1 else gates,
            sent=[row[layer] for row in routes.received_WL],
            received=[row[layer] for row in routes.sent_WL],
            home=routes.layers[layer],
        )
        for layer in range(L)
    ]


def return_sums(arrived: Arrived, sums_NO: Tensor, all_to_all: AllToAll) -> AddExperts:
    """Launch the owner's sums (N', O) homeward; the result lands them and adds them to a base output (T, O)."""
    way = Homeward(all_to_all, arrived.sent, arrived.received)
    buffer = way.launch(sums_NO)

    def add(base_TO: Tensor) -> Tensor:
        rows_NO = way.land(buffer)
        result: Tensor = Combine.apply(base_TO, rows_NO, arrived.home.token_N, arrived.home.slots_TQ)
        return result

    return add


class SharedInputDispatcher:
    """Dispatcher of the linears that read one tensor (q, k and v; gate and up): whichever comes first sends for all."""

    def __init__(self, layers: Sequence[MixtureLinear], all_to_all: AllToAll) -> None:
        self.layers, self.all_to_all = list(layers), all_to_all
        self._sent = SharedInput(self.layers, self._send)

    def start(self, layer: MixtureLinear, x: Tensor) -> tuple[Tensor, AddExperts]:
        """Rows out unless a sibling has sent them, this layer's experts, and their sums launched homeward."""
        x_TI, arrived = self._sent.take(layer, x)
        return x_TI, return_sums(arrived, layer.sum_experts(arrived.rows, arrived.gates), self.all_to_all)

    def _send(self, x: Tensor) -> list[tuple[Tensor, Arrived]]:
        inputs = [layer.project(x) for layer in self.layers]
        routings = [each.routing for each in inputs if each.routing is not None]
        arrived = send_rows([each.h for each in inputs], routings, self.all_to_all)
        return [(each.x_TI, part) for each, part in zip(inputs, arrived, strict=True)]
