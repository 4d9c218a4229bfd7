"""Kernels and waits of linears and a block on the GPU, beside what tests/strict/counts.json counts without one."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu.measure import DEVICE, kernels, waits
from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.bench.local.launch_cases import BASELINES, CASES
from malora_dist.bench.local.peers.build import Adapted, Base, build
from malora_dist.ops.dropout import token_keys
from malora_dist.ops.products import kept_weight_copies

GOLDEN = Path("tests/strict/counts.json")
# Those of the golden numbers.
HIDDEN, TOKENS, DTYPE = 64, 16, torch.bfloat16
BASES = {"bf16": False, "nf4": True}
NAMES = ("base", "lora", "malora", "malora_grouped", "malora_fused")


def beside_golden(case: str, kind: str) -> str:
    """Say for each baseline on a case and base what was counted here and, in brackets, without a GPU."""
    golden = json.loads(GOLDEN.read_text())
    base, said = base_of(case, BASES[kind]), []
    for name in NAMES:
        row = golden.get(f"{case}, {kind}, {name}, dropout {0 if name == 'base' else 0.05:g}")
        if row is not None:
            step = one_pass(build(BASELINES[name], base, dropout=0.0 if name == "base" else 0.05))
            found = kernels(step).number, waits(step)
            said.append(f"{name} {found[0]} ({row['launches']}), waits {found[1]} ({row['waits']})")
    assert said, f"{GOLDEN} has no row of {case}, {kind}"
    return "; ".join(said)


def base_of(case: str, load_in_4bit: bool) -> Base:
    module, targets = CASES[case]
    torch.manual_seed(0)
    model: nn.Module = module(HIDDEN).to(DTYPE).to(DEVICE)
    return Base.of(model, targets, load_in_4bit=load_in_4bit, peft=False)


def one_pass(adapted: Adapted) -> Callable[[], None]:
    """Forward and backward as training does them: layers share dropout's keys, and keep their copies of weights."""
    x = torch.randn(1, TOKENS, HIDDEN, dtype=DTYPE, device=DEVICE, requires_grad=True)
    tokens = torch.arange(TOKENS)
    host_keys = token_keys(0, 1, torch.zeros_like(tokens), tokens)

    def run() -> None:
        keys = host_keys.to(DEVICE, non_blocking=True)
        for _, layer in mixture_layers(adapted.model):
            layer.token_keys = keys
        for parameter in [x, *adapted.trained]:
            parameter.grad = None
        with kept_weight_copies(adapted.model):
            adapted.model(x).sum().backward()

    return run
