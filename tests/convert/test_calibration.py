"""Routing statistics of packed rows, against samples on their own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.config import load_config
from malora_dist.convert import calibration
from malora_dist.convert.calibration import calibration_samples, collect
from malora_dist.convert.gates import deciding
from malora_dist.convert.subspace import subspace_of
from malora_dist.data.build import build_data
from malora_dist.data.packed_row import Packing
from malora_dist.evaluation.packing import packing_of
from malora_dist.models.load import load_tokenizer
from malora_dist.ops.routing import Routing
from tests.convert.made import base


@pytest.mark.parametrize("packing", [Packing.TREES, Packing.ALONE])
def test_moments_over_every_token_of_a_task(workspace: Path, monkeypatch: pytest.MonkeyPatch, packing: Packing) -> None:
    source = workspace / "runs" / "malora"
    data = build_data(load_config(source / "config.yaml").data, load_tokenizer(workspace / "model"))
    samples = calibration_samples(data, 1, 9)
    assert {sample.task_id for sample in samples} == {1} and len({sample.sample_id for sample in samples}) == 9
    assert len(calibration_samples(data, 1, 10**6)) == data.train_sizes[1]
    model = base(workspace)
    load_adapter(model, source)
    adapter = open_adapter(source)
    downs = {layer: subspace_of(adapter.read_layer(layer)).S_DI for layer in adapter.layers()}
    assert packing_of(model) is Packing.TREES
    monkeypatch.setattr(calibration, "packing_of", lambda model, longest: packing)
    monkeypatch.setattr(calibration, "ROW_TOKENS", 60)
    assert 1 < len(calibration._rows(samples, 60)) < 9
    found = collect(model, samples, downs)

    seen: dict[str, list[tuple[Tensor, Routing]]] = {layer: [] for layer in downs}

    def note(layer: str, x_TI: Tensor, routing: Routing) -> Routing:
        seen[layer].append((x_TI, routing))
        return routing

    with torch.no_grad(), deciding(model, note):
        for sample in samples:
            model(input_ids=torch.tensor([sample.input_ids.tolist()]), use_cache=False)
    for layer, pieces in seen.items():
        moment, gated, gates = torch.zeros(6, 6).double(), torch.zeros(4, 6, 6).double(), torch.zeros(4).double()
        for x_TI, routing in pieces:
            for x_I, weights, ids in zip(x_TI, routing.gates_TK, routing.expert_ids_TK, strict=True):
                h = downs[layer] @ x_I.double()
                moment += torch.outer(h, h)
                for weight, expert in zip(weights.tolist(), ids.tolist(), strict=True):
                    gates[expert] += weight
                    gated[expert] += weight * torch.outer(h, h)
        statistics = found[layer]
        assert statistics.moment_DD is not None and statistics.gated_EDD is not None
        assert statistics.tokens == sum(len(sample.input_ids) for sample in samples)
        for value, wanted in (
            (statistics.gates_E, gates),
            (statistics.moment_DD, moment),
            (statistics.gated_EDD, gated),
        ):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
