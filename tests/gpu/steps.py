"""One micro-batch of packed samples through a small adapted model, on any device: loss, gradients, dropout masks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.ops.dropout import dropout_mask, token_keys
from malora_dist.ops.products import kept_weight_copies
from malora_dist.training.balance_loss import BalanceSettings, StepBalance
from tests.tiny_models import tiny_config

SIZES = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 128}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1}
BALANCE = BalanceSettings(0.01, "mean", "local")
SAMPLES = (23, 1, 40)


@dataclass(frozen=True)
class Case:
    """A method with options of `inject_adapters`."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])


DROPOUT = {"lora_dropout": 0.1}
CASES = [
    *(Case(method, DROPOUT) for method in METHODS),
    *(Case("malora", {**DROPOUT, "fuse_projections": fused}) for fused in (True, False)),
    *(Case("malora", {**DROPOUT, "computation": name}) for name in ("dense", "grouped")),
    Case("malora"),
]
# Where Triton can run.
KERNEL_CASES = [Case("malora", {**DROPOUT, "computation": "grouped_triton"})]


def adapted_model(device: torch.device, dtype: torch.dtype, case: Case) -> nn.Module:
    """A Llama with an adapter whose B is not 0; base and B are drawn on the CPU, the rest as a run draws it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**SIZES, **HEADS, use_cache=False)).to(dtype).to(device)
    numbers = {"num_experts": 8} if METHODS[case.method].routed else {}
    inject_adapters(model, mixture_spec(case.method, r=6, **numbers), seed=1, **case.options)
    for number, (name, parameter) in enumerate(adapter_parameters(model)):
        if name.endswith(".B"):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.copy_(0.05 * drawn)
    return model.train()


def micro_batch(device: torch.device) -> MicroBatch:
    """Three samples of two tasks, one of a single token, in one row."""
    draw = np.random.default_rng(0)
    samples = [
        Sample(number, number % 2, draw.integers(0, SIZES["vocab_size"], length).astype(np.int32), length // 3)
        for number, length in enumerate(SAMPLES)
    ]
    return collate(samples).to(device)


class Step:
    """Forward and backward of one micro-batch, as training does; a call returns the loss and leaves new gradients."""

    def __init__(self, device: torch.device, dtype: torch.dtype, case: Case) -> None:
        self.model = adapted_model(device, dtype, case)
        self.batch = micro_batch(device)
        set_token_keys(self.model, self.batch, 5, 1)

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        with kept_weight_copies(self.model):
            loss = cross_entropies(self.model, self.batch).mean()
            aux = StepBalance(self.model, BALANCE, 2, 1, self.batch.input_ids.device).add(self.batch)
            total = loss + aux
            total.backward()
        return total.detach()

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that is trained."""
        return ((name, parameter) for name, parameter in adapter_parameters(self.model) if parameter.requires_grad)

    def gradients(self) -> dict[str, Tensor]:
        """On the CPU, in fp32."""
        return {name: parameter.grad.float().cpu() for name, parameter in self.trained() if parameter.grad is not None}


def gradient_bound(case: Case, dtype: torch.dtype) -> float:
    """The largest relative difference of a gradient that the order of sums explains.

    In 16 bits a token's experts may be others where two are about as likely, and then gradients are others, too; a
    gradient of nonsense differs by 1 or more.
    """
    if dtype == torch.float32:
        return 2e-4
    structure = METHODS[case.method]
    return 0.6 if structure.routed and not structure.dense else 0.05


def worst_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient, and whose it is; small gradients count against all together.

    A difference that is not a number is the largest.
    """
    assert set(found) == set(wanted)
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    errors = {
        name: float((found[name] - gradient).norm() / (gradient.norm() + 1e-3 * total))
        for name, gradient in wanted.items()
    }
    name = max(errors, key=lambda key: (math.isnan(errors[key]), errors[key]))
    return errors[name], name


def masks(device: torch.device, p: float, features: int) -> Tensor:
    """Dropout masks of tokens of several samples and steps, made on a device."""
    samples, positions = (torch.arange(301, device=device) // 7, torch.arange(301, device=device) % 7)
    keys = torch.cat([token_keys(seed, step, samples, positions) for seed, step in ((0, 0), (42, 1000))])
    return torch.cat([dropout_mask(keys, salt, features, p).bool() for salt in (0, 7, -(2**31))]).cpu()


def layer_count(step: Step) -> int:
    """Adapted linears of the model."""
    return sum(1 for _ in mixture_layers(step.model))
