"""A step trains, with the balance loss of engine.forward and the dropout keys of training."""

import pytest
import torch

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.bench.local.losses import Batch
from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.local.peers.build import Base, build
from malora_dist.bench.local.trainee import BALANCE_COEFFICIENT, Trainee
from tests.reference import balance_reference
from tests.tiny_models import tiny_llama

BATCH = Batch.of(2, 10, 61, 1.0, torch.device("cpu"))


@pytest.mark.parametrize("name", ["base", "peft_lora", "malora", "molora_looped"])
def test_a_step_trains_what_it_should(name: str) -> None:
    base = Base.of(tiny_llama(), DEFAULT_TARGETS, load_in_4bit=False, peft=True)
    before = [p.clone() for p in base.ours.parameters()]
    trainee = Trainee(build(BASELINES[name], base), BATCH)
    losses = [float(trainee()) for _ in range(4)]
    assert (losses[-1] < losses[0]) == (name != "base")
    assert all(p.grad is None for p in trainee.adapted.trained)
    assert all(torch.equal(a, b) for a, b in zip(before, base.ours.parameters(), strict=True))
    hidden = []
    trainee.adapted.model.get_input_embeddings().register_forward_hook(lambda m, i, o: hidden.append(o))
    trainee.backward()
    assert hidden[0].requires_grad == (name == "base"), "the floor passes gradients down to its input"


@pytest.mark.parametrize("name", ["malora", "molora_looped"])
def test_balance_loss_is_the_mean_over_routers(name: str) -> None:
    base = Base.of(tiny_llama(), DEFAULT_TARGETS, load_in_4bit=False, peft=False)
    trainee = Trainee(build(BASELINES[name], base), BATCH)
    trainee.adapted.model(input_ids=BATCH.ids)
    routings = [layer.routing for layer in trainee.adapted.routers]
    expected = torch.stack([balance_reference(r.probs_TE, r.expert_ids_TK) for r in routings]).mean()
    torch.testing.assert_close(trainee.balance_loss(), BALANCE_COEFFICIENT * expected)


def test_keys_are_new_in_each_step() -> None:
    base = Base.of(tiny_llama(), DEFAULT_TARGETS, load_in_4bit=False, peft=False)
    trainee = Trainee(build(BASELINES["malora"], base, dropout=0.5), BATCH, dropout=True)
    seen = []
    for _ in range(2):
        trainee()
        seen.append([layer.token_keys for _, layer in mixture_layers(trainee.adapted.model)])
    assert all(keys is seen[0][0] for keys in seen[0]) and len(set(seen[0][0].tolist())) == BATCH.tokens
    assert not torch.equal(seen[0][0], seen[1][0])
