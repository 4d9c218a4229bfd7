"""Expert parallelism of adapted linears: tokens travel to the ranks that own their experts, sums travel home."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.functional.routing import Routing, dense_gates
from malora_dist.nn.mixture import AddExperts, MixtureLinear
from malora_dist.parallel.exchange import Combine, Homeward, SendRows, Spread, Wire
from malora_dist.parallel.routes import Positions, Routes, make_routes


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


def send_rows(h: Sequence[Tensor], routings: Sequence[Routing], wire: Wire) -> list[Arrived]:
    """Bring tokens of L layers to their owners: h[l] (T, D) with routing over all experts -> rows at the owner.

    All layers share one exchange of counts and one of rows.
    """
    num_experts = routings[0].probs_TE.shape[1]
    routes = make_routes([routing.expert_ids_TK for routing in routings], num_experts, wire.group)
    wire.count("counts", [1] * len(routes.sent_WL), len(h) * 8)
    W = len(routes.sent_WL)
    stacked = routes.stacked
    rows = Spread.apply(torch.cat(list(h)), stacked.token_N, stacked.slots_TQ)
    gates = torch.cat([dense_gates(routing) for routing in routings]).view(-1, num_experts // W)
    row_gates = gates.index_select(0, stacked.token_N * W + routes.owner_N)
    sent, received = [sum(row) for row in routes.sent_WL], [sum(row) for row in routes.received_WL]
    rows, row_gates = SendRows.apply(rows, row_gates, wire, sent, received)
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


def return_sums(arrived: Arrived, sums_NO: Tensor, wire: Wire) -> AddExperts:
    """Launch the owner's sums (N', O) homeward; the result lands them and adds them to a base output (T, O)."""
    way = Homeward(wire, arrived.sent, arrived.received)
    buffer = way.launch(sums_NO)

    def add(base_TO: Tensor) -> Tensor:
        rows_NO = way.land(buffer)
        result: Tensor = Combine.apply(base_TO, rows_NO, arrived.home.token_N, arrived.home.slots_TQ)
        return result

    return add


class SharedInputDispatcher:
    """Dispatcher of the linears that read one tensor (q, k and v; gate and up): whichever comes first sends for all."""

    def __init__(self, layers: Sequence[MixtureLinear], wire: Wire) -> None:
        self.layers, self.wire = list(layers), wire
        self._input: _Memory | None = None
        self._arrived: dict[int, Arrived] = {}

    def start(self, layer: MixtureLinear, x: Tensor) -> AddExperts:
        """Rows out unless a sibling has sent them, this layer's experts, and their sums launched homeward."""
        if id(layer) not in self._arrived or self._input is None or not self._input.holds(x):
            self._send(x)
        arrived = self._arrived.pop(id(layer))
        if not self._arrived:
            self._input = None
        return return_sums(arrived, layer.sum_experts(arrived.rows, arrived.gates), self.wire)

    def _send(self, x: Tensor) -> None:
        entered = [layer.enter(x) for layer in self.layers]
        routings = [routing for _, routing in entered if routing is not None]
        arrived = send_rows([h for h, _ in entered], routings, self.wire)
        self._input = _Memory(x)
        self._arrived = {id(layer): part for layer, part in zip(self.layers, arrived, strict=True)}


class _Memory:
    """The numbers of a tensor as they are now; kept alive, so that nothing else takes their place."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)

    def holds(self, other: Tensor) -> bool:
        """Whether `other` is the same numbers in memory: DeepSpeed's hooks hand each module an alias of its input."""
        tensor = self._tensor
        return (
            tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
            and tensor.storage_offset() == other.storage_offset()
            and tensor.shape == other.shape
            and tensor.stride() == other.stride()
            and self._version == _version(other)
        )


def _version(tensor: Tensor) -> int:
    """How often the memory was written to in place; inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
