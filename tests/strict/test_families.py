"""Bases of other families than Llama's, in 4 bits: read, measured, trained and scored as on the CPU."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.target_names import ALL_LINEAR
from malora_dist.bench.strict.device import StrictDevice
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.data.packed_row import Packing
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.evaluation.packing import packing_of
from malora_dist.evaluation.scoring import score_items
from malora_dist.evaluation.tasks import forward_of
from malora_dist.models.load import load_base_model
from malora_dist.training.balance_loss import BalanceSettings, StepBalance
from tests.evaluation.test_packing import changes_of, questions
from tests.families import family_model


class Base(NamedTuple):
    """What is special about a family: its attention, what its rows take, and whether its own code waits."""

    attention: str
    packing: Packing
    waits: bool = False


BASES = {
    "mistral": Base("sdpa", Packing.TREES),  # windows
    "gemma2": Base("eager", Packing.TREES),  # windows in some layers, masks as numbers, capped scores
    "gemma3_text": Base("sdpa", Packing.TREES),  # buffers that no file holds
    "llama4_text": Base("sdpa", Packing.TREES),  # chunks
    "gpt2": Base("sdpa", Packing.TREES),  # Conv1D
    "bloom": Base("eager", Packing.SEQUENCES),  # distances in place of positions
    "mamba": Base("eager", Packing.ALONE),  # a state
    "mixtral": Base("sdpa", Packing.TREES),  # experts
}


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tiny model, of the family's name."""
    family = request.param
    family_model(family, noise=0, **changes_of(family)).save_pretrained(tmp_path / family)
    return tmp_path / family


def adapted(folder: Path, method: str, device: str) -> Any:
    """The base in 4 bits, with adapters that matter."""
    model = load_base_model(
        folder, dtype=torch.float32, attn_implementation=BASES[folder.name].attention, device=device
    )
    spec = mixture_spec(method, r=2) if method == "dora" else mixture_spec(method, num_experts=4, r=2)
    inject_adapters(model, spec, [ALL_LINEAR])
    with torch.no_grad():
        for number, (_, layer) in enumerate(mixture_layers(model)):
            layer.B.copy_(0.1 * torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(number)))
    return model


def micro_batch(packing: Packing, device: str) -> MicroBatch:
    draw = np.random.default_rng(0)
    lengths = (14,) if packing is Packing.ALONE else (9, 1, 14)
    samples = [Sample(i, i % 2, draw.integers(5, 60, n).astype(np.int32), n // 2) for i, n in enumerate(lengths)]
    return collate(samples).to(device)


def gradients(model: Any, batch: MicroBatch) -> dict[str, Tensor]:
    """The loss of a micro-batch, and all gradients."""
    model.train()
    device = batch.input_ids.device
    balance = StepBalance(model, BalanceSettings(0.01, "mean", "global"), 2, 1, device)
    balance.start(torch.full((), float(batch.input_ids.numel()), dtype=torch.float64, device=device), 1)
    set_token_keys(model, batch, 3, 1)
    loss = cross_entropies(model, batch).mean() + balance.add(batch).float()
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapter_parameters(model) if parameter.requires_grad}
    model.zero_grad()
    return {"loss": loss.detach()} | {name: gradient for name, gradient in found.items() if gradient is not None}


def scores(model: Any, packing: Packing, device: str) -> Tensor:
    found = score_items(forward_of(model.eval()), questions(), batch_tokens=256, packing=packing, device=device)
    return torch.tensor([found[choice] for choice in sorted(found)])


def answers(folder: Path, method: str, device: str) -> dict[str, Tensor]:
    """What is trained on, and scores by every packing that the base takes."""
    model, wanted = adapted(folder, method, device), BASES[folder.name].packing
    assert packing_of(model.eval()) is wanted
    found = gradients(model, micro_batch(wanted, device))
    found |= {packing.name: scores(model, packing, device) for packing in list(Packing)[: wanted.value]}
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("method", ["malora", "dora"])
def test_a_family_gives_the_numbers_of_the_cpu(strict: StrictDevice, folder: Path, method: str) -> None:
    wanted, found = (answers(folder, method, device) for device in ("cpu", "strict"))
    assert set(found) == set(wanted) and len(found) > 5
    # Not bit for bit: the CPU has an attention kernel of its own.
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-6, name


def test_a_step_does_not_make_the_host_wait(strict: StrictDevice, folder: Path) -> None:
    base = BASES[folder.name]
    model, batch = adapted(folder, "malora", "strict"), micro_batch(base.packing, "strict")
    gradients(model, batch)
    strict.counts.reset()
    gradients(model, batch)
    assert bool(strict.counts.totals()["waits"]) == base.waits, strict.counts.report()
