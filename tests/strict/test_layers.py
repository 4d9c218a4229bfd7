"""Adapted models on the device, of every method with every option: the numbers are those of the CPU run."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.bench.strict.device import StrictDevice
from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.models.loss_head import install_loss_head
from malora_dist.ops.loss import batch_counts, target_weights
from malora_dist.training.balance_loss import BalanceSettings, StepBalance
from tests.pairwise import pairwise
from tests.tiny_models import tiny_llama

CASES = list(
    pairwise(
        {
            "method": list(METHODS),
            "computation": ["auto", "dense", "grouped"],
            "dropout": [0.0, 0.3],
            "fuse_projections": [False, True],
            "normalize_gates": [False, True],
            "gradient_checkpointing": [False, True],
            "router_input": ["x", "h"],
            "router_dtype": ["float32", "input"],
            "loss_head": [False, True],
            "balance": ["global", "local"],
            "z_loss": [0.0, 0.1],
        }
    )
)


def numbers(case: dict[str, Any], device: str) -> dict[str, Tensor]:
    """The loss, the balance loss and every gradient of one micro-batch, of a model adapted on the device."""
    model = tiny_llama().to(device)
    switches = {key: case[key] for key in ("normalize_gates", "router_input", "router_dtype")}
    spec = mixture_spec(case["method"], num_experts=4, r=3, **switches)
    inject_adapters(
        model,
        spec,
        lora_dropout=case["dropout"],
        computation=case["computation"],
        fuse_projections=case["fuse_projections"],
        seed=3,
    )
    if case["loss_head"]:
        assert install_loss_head(model)
    if case["gradient_checkpointing"]:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trained = {name: parameter for name, parameter in adapter_parameters(model) if parameter.requires_grad}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trained.items()):
            if name.endswith(".B"):
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.copy_(0.1 * drawn)
    draw = np.random.default_rng(0)
    samples = [
        Sample(i, i % 2, draw.integers(0, 61, size).astype(np.int32), size // 2) for i, size in enumerate((9, 1, 14))
    ]
    batch = collate(samples).to(torch.device(device))
    model.train()
    settings = BalanceSettings(0.01, "mean", case["balance"], z_coefficient=case["z_loss"])
    balance = StepBalance(model, settings, 2, 1, torch.device(device))
    set_token_keys(model, batch, 3, 1)
    ce_N = cross_entropies(model, batch)
    aux = balance.add(batch) + case["z_loss"] * balance.z_share
    counts = batch_counts(batch.tasks_and_targets, 2).to(device)
    weights_N = target_weights(batch.target_sample, batch.task_ids, batch.target_counts, counts, "token")
    loss = (ce_N * weights_N).sum()
    (loss + settings.coefficient * aux).backward()
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    assert set(gradients) == set(trained)
    return {"loss": loss.detach().cpu(), "aux": aux.detach().cpu()} | {n: g.cpu() for n, g in gradients.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_model_gives_the_numbers_of_the_cpu(strict: StrictDevice, case: dict[str, Any]) -> None:
    wanted, found = (numbers(case, device) for device in ("cpu", "strict"))
    assert set(found) == set(wanted)
    # Not bit for bit: the CPU has an attention kernel of its own.
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
