"""How a mixture routes the tokens of a task: means of gates and second moments in the shared subspace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from malora_dist.console.progress import tracked
from malora_dist.convert.gates import deciding
from malora_dist.data.build import PreparedData
from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.data.packed_row import Packing
from malora_dist.errors import DataError
from malora_dist.evaluation.packed_forward import cross_entropies
from malora_dist.evaluation.packing import packing_of
from malora_dist.models.packed_attention import longest_row
from malora_dist.ops.routing import Routing

ROW_TOKENS = 2048


@dataclass
class LayerStatistics:
    """Sums over T tokens of one layer, fp64: of g (E,), of h h' (D, D) and of g_t h h' (E, D, D), with h = S x.

    The moments are None where only gates were asked for.
    """

    tokens: int
    gates_E: Tensor
    moment_DD: Tensor | None
    gated_EDD: Tensor | None

    @property
    def mean_gates_E(self) -> Tensor:
        """E[g_t] over all tokens, 0 where an expert was not chosen."""
        return self.gates_E / self.tokens


def calibration_samples(data: PreparedData, task_id: int, count: int) -> list[Sample]:
    """Return up to `count` training samples of a task, evenly spread over it. Raises DataError if it has none."""
    first, size = sum(data.train_sizes[:task_id]), data.train_sizes[task_id]
    if size == 0:
        raise DataError(f"task {data.task_names[task_id]} has no training rows to calibrate on")
    count = min(count, size)
    return [data.train[first + i * size // count] for i in range(count)]


@torch.no_grad()
def collect(
    model: nn.Module, samples: Sequence[Sample], downs: Mapping[str, Tensor] | None = None
) -> dict[str, LayerStatistics]:
    """Collect, on the CPU, statistics of each routed layer over all tokens of the samples, run packed, without dropout.

    `downs` are S (D, I) by layer; without them only gates are summed.
    """
    found: dict[str, LayerStatistics] = {}

    def note(layer: str, x_TI: Tensor, routing: Routing) -> Routing:
        g_TE = routing.gates_TE.double()
        new = LayerStatistics(len(g_TE), g_TE.sum(dim=0), None, None)
        if downs is not None:
            h_TD = (x_TI @ downs[layer].to(x_TI).T).double()
            new.moment_DD = h_TD.T @ h_TD
            new.gated_EDD = torch.stack([(h_TD * g_T[:, None]).T @ h_TD for g_T in g_TE.T])
        found[layer] = _sum(found[layer], new) if layer in found else new
        return routing

    device = next(model.parameters()).device
    longest = max(len(sample.input_ids) for sample in samples)
    most = longest_row(model.config) or ROW_TOKENS
    limit = 1 if packing_of(model, longest=longest) is Packing.ALONE else min(ROW_TOKENS, most)
    with deciding(model, note):
        for row in tracked("measuring gates, rows", _rows(samples, limit)):
            cross_entropies(model, collate(row).to(device))
    return {layer: _on_cpu(statistics) for layer, statistics in found.items()}


def _on_cpu(sums: LayerStatistics) -> LayerStatistics:
    moment, gated = (None if sum_ is None else sum_.cpu() for sum_ in (sums.moment_DD, sums.gated_EDD))
    return LayerStatistics(sums.tokens, sums.gates_E.cpu(), moment, gated)


def _sum(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    moment, gated = a.moment_DD, a.gated_EDD
    if b.moment_DD is not None and b.gated_EDD is not None and moment is not None and gated is not None:
        moment, gated = moment + b.moment_DD, gated + b.gated_EDD
    return LayerStatistics(a.tokens + b.tokens, a.gates_E + b.gates_E, moment, gated)


def _rows(samples: Sequence[Sample], limit: int) -> list[list[Sample]]:
    """Pack samples into rows of about `limit` tokens, at least one sample each."""
    rows: list[list[Sample]] = []
    filled = limit
    for sample in samples:
        if filled + len(sample.input_ids) > limit:
            rows.append([])
            filled = 0
        rows[-1].append(sample)
        filled += len(sample.input_ids)
    return rows
