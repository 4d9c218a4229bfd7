"""The balance loss of a step is that of all its tokens, whoever saw them; its gradient takes f from the step before."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import mixture_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.ops.routing import Routing
from malora_dist.training.balance_loss import BalanceSettings, StepBalance
from tests.families import family_model
from tests.tiny_models import tiny_llama

NUM_EXPERTS, TASKS = 4, 2
SIZES = (9, 1, 14, 3, 6, 2, 30, 5)
ALL = range(len(SIZES))
# Ways to deal the samples: to processes, and there to micro-batches.
WAYS: dict[str, list[list[Sequence[int]]]] = {
    "at once": [[ALL]],
    "one by one": [[[i] for i in ALL]],
    "two processes": [[ALL[:2], ALL[2:4]], [ALL[4:6], ALL[6:]]],
    "unequal processes": [[[6], [1, 3, 5]], [[0], [2, 4, 7]]],
}


def model_with_adapters(method: str = "malora") -> nn.Module:
    model = tiny_llama()
    spec = mixture_spec(method, num_experts=NUM_EXPERTS, r=3)
    inject_adapters(model, spec, ("q_proj", "down_proj"), lora_dropout=0, seed=3)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapter_parameters(model)):
            if name.endswith(("gate", ".B")):
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.copy_(0.3 * drawn)
    return model.train()


def micro_batch(members: Sequence[int]) -> MicroBatch:
    samples = []
    for i in members:
        ids = np.random.default_rng(i).integers(0, 61, SIZES[i]).astype(np.int32)
        samples.append(Sample(i, i % TASKS, ids, SIZES[i] // 2))
    return collate(samples)


def step(model: nn.Module, way: list[list[Sequence[int]]], balances: list[StepBalance]) -> tuple[float, list[Tensor]]:
    """One step of as many processes as `balances`: the loss it reports, and the gradients that all add up to."""
    model.zero_grad()
    tokens = torch.tensor(float(sum(SIZES)), dtype=torch.float64)
    for balance, batches in zip(balances, way, strict=True):
        balance.start(tokens, len(batches))
        for batch in map(micro_batch, batches):
            set_token_keys(model, batch, 3, 1)
            cross_entropies(model, batch)
            balance.add(batch).backward()
    total = torch.stack([balance.sums() for balance in balances]).sum(dim=0)
    losses = {float(balance.finish(total)) for balance in balances}
    assert len(losses) == 1
    return losses.pop(), [p.grad.clone() for _, p in adapter_parameters(model) if p.grad is not None]


def new_balances(model: nn.Module, processes: int, **changes: Any) -> list[StepBalance]:
    settings = BalanceSettings(**{"coefficient": 0.01, "reduction": "mean", "scope": "global", **changes})
    return [StepBalance(model, settings, TASKS, processes, torch.device("cpu")) for _ in range(processes)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_the_same_however_its_samples_are_dealt(way: str, reduction: str) -> None:
    model = model_with_adapters()
    dealt, whole = (new_balances(model, len(WAYS[name]), reduction=reduction) for name in (way, "at once"))
    for _ in range(2):
        (loss, gradients), (wanted, expected) = step(model, WAYS[way], dealt), step(model, WAYS["at once"], whole)
        assert loss == pytest.approx(wanted, abs=1e-7) and loss > 1.01
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-7, rtol=1e-5)
    counted = torch.stack([balance.counts_GLE for balance in dealt]).sum(dim=0)
    assert torch.equal(counted, whole[0].counts_GLE) and counted.sum() > 0


def test_the_first_step_pulls_nowhere_and_the_next_where_choices_were_few() -> None:
    model = model_with_adapters()
    balances = new_balances(model, 1)
    first, second = (step(model, WAYS["at once"], balances)[1] for _ in range(2))
    assert max(float(gradient.abs().max()) for gradient in first) < 1e-7
    assert max(float(gradient.abs().max()) for gradient in second) > 1e-4


def test_a_local_loss_is_one_of_each_micro_batch() -> None:
    """It depends on how samples are dealt; the shares of two micro-batches are half of what each has alone."""
    model = model_with_adapters()
    alone = [step(model, [[part]], new_balances(model, 1, scope="local"))[0] for part in (ALL[:2], ALL[2:])]
    both = step(model, [[ALL[:2], ALL[2:]]], new_balances(model, 1, scope="local"))[0]
    ranks = step(model, [[ALL[:2]], [ALL[2:]]], new_balances(model, 2, scope="local"))[0]
    assert both == pytest.approx(sum(alone) / 2, abs=1e-6) == ranks
    assert abs(both - step(model, [[ALL]], new_balances(model, 1, scope="local"))[0]) > 1e-3


@pytest.mark.parametrize("method", ["lora", "hydralora"])
def test_nothing_to_balance_is_0(method: str) -> None:
    model, batch = model_with_adapters(method), micro_batch(ALL)
    (balance,) = new_balances(model, 1)
    balance.start(torch.tensor(float(sum(SIZES))), 1)
    set_token_keys(model, batch, 3, 1)
    cross_entropies(model, batch)
    assert not balance.add(batch).requires_grad
    assert float(balance.finish(balance.sums())) == 0 and balance.counts_GLE.numel() == 0
    assert not balance.layers and balance.state_dict() == {"expert_counts": []}


def test_its_state_is_what_the_next_step_takes() -> None:
    model = model_with_adapters()
    balances, others = new_balances(model, 1), new_balances(model, 1)
    step(model, WAYS["at once"], balances)
    others[0].load_state_dict(balances[0].state_dict(), "here")
    wanted, found = (step(model, WAYS["one by one"], each) for each in (balances, others))
    assert wanted[0] == found[0] and all(map(torch.equal, wanted[1], found[1]))


ROWS = {"short": [[1, 2, 3]] * 4, "negative": [[1, 2, 3, -4]] * 4, "not counts": [[1, 2, 3, True]] * 4}


@pytest.mark.parametrize("counts", [None, [], [[1, 2, 3, 4]], *ROWS.values()], ids=["none", "empty", "one", *ROWS])
def test_counts_of_other_layers_are_refused(counts: Any) -> None:
    (balance,) = new_balances(model_with_adapters(), 1)
    rule = "state.balance.expert_counts must be 4 lists of 4 counts"
    with pytest.raises(CheckpointError, match=f"step-000003: {re.escape(rule)}"):
        balance.load_state_dict({"expert_counts": counts}, "step-000003")


@pytest.mark.parametrize("scope", ["global", "local"])
def test_every_call_of_a_repeated_layer_counts(scope: str) -> None:
    """Its probabilities are means over the calls; a layer beside it is called once."""
    layers = nn.ModuleDict({"once": nn.Linear(8, 8), "often": nn.Linear(8, 8)})
    inject_adapters(layers, mixture_spec("malora", num_experts=NUM_EXPERTS, r=2), ["once", "often"])
    batch, x_TI = micro_batch(ALL), torch.randn(sum(SIZES), 8)
    balance = StepBalance(layers, BalanceSettings(0.01, "sum", scope), TASKS, 1, torch.device("cpu"))
    balance.start(torch.tensor(float(sum(SIZES)), dtype=torch.float64), 1)
    set_token_keys(layers, batch, 3, 1)
    routings: dict[str, list[Routing]] = {"once": [], "often": []}
    for name, factor in (("once", 1.0), ("often", 1.0), ("often", -2.0), ("often", 3.0)):
        layers[name](factor * x_TI)
        routings[name].append(layers[name].routing)
    share = balance.add(batch)
    wanted = 0.0
    for number, calls in enumerate(routings.values()):
        counts_E = torch.cat([call.expert_ids_TK for call in calls]).flatten().bincount(minlength=NUM_EXPERTS)
        assert torch.equal(balance.counts_GLE.sum(dim=0)[number].long(), counts_E)
        mean_prob_E = torch.cat([call.probs_TE for call in calls]).mean(dim=0).detach()
        wanted += float(NUM_EXPERTS * (counts_E / counts_E.sum() * mean_prob_E).sum())
    assert float(balance.finish(balance.sums())) == pytest.approx(wanted)
    assert float(share.detach()) == pytest.approx(2 if scope == "global" else wanted)


def test_a_family_that_repeats_its_layers_is_balanced_over_all_of_them() -> None:
    model = family_model("hrm_text")
    inject_adapters(model, mixture_spec("malora", num_experts=NUM_EXPERTS, r=2), ["q_proj"])
    layers, batch = [layer for _, layer in mixture_layers(model)], micro_batch(ALL)
    calls: list[MixtureLinear] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    (balance,) = new_balances(model.train(), 1)
    set_token_keys(model, batch, 3, 1)
    cross_entropies(model, batch)
    balance.add(batch)
    assert len(calls) > len(layers)
    totals = balance.counts_GLE.sum(dim=(0, 2)).tolist()
    assert totals == [calls.count(layer) * layer.top_k * sum(SIZES) for layer in layers]


@pytest.mark.parametrize(
    ("rows", "message"), [(None, "never calls it"), (3, "reads 3 rows of a micro-batch of 4 tokens")]
)
def test_a_layer_that_does_not_see_every_token_is_named(rows: int | None, message: str) -> None:
    layer = nn.ModuleDict({"up": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    inject_adapters(layer, mixture_spec("malora", num_experts=NUM_EXPERTS, r=2), ["up", "other"])
    batch = collate([Sample(0, 0, np.arange(4, dtype=np.int32), 2)])
    balance = StepBalance(layer, BalanceSettings(0.01, "mean", "global"), TASKS, 1, torch.device("cpu"))
    layer["up"](torch.ones(4, 8))
    if rows is not None:
        layer["other"](torch.ones(rows, 8))
    with pytest.raises(ConfigError, match=f"adapter.target_modules: other .*{message}"):
        balance.add(batch)
