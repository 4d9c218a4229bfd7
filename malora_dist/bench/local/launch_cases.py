"""What launches are counted of: one linear, projections of one input, and a block, forward and backward on the device.

A count says nothing of a time, and little depends on sizes: small ones do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.bench.local.peers.baselines import LORA, MALORA, MOLORA, Baseline
from malora_dist.bench.local.peers.build import Adapted, Base, build
from malora_dist.bench.strict.device import TYPE, StrictDevice
from malora_dist.ops.dropout import token_keys
from malora_dist.ops.products import kept_weight_copies

Counted = dict[str, int]

BASELINES: dict[str, Baseline] = {
    "base": Baseline(maker="base"),
    "peft_lora": Baseline(maker="peft", numbers=LORA),
    "peft_dora": Baseline(maker="peft", method="dora", numbers=LORA),
    "lora": Baseline(maker="ours", numbers=LORA),
    "dora": Baseline(maker="ours", method="dora", numbers=LORA),
    "molora": Baseline(maker="ours", method="molora", numbers=MOLORA),
    "hydralora": Baseline(maker="ours", method="hydralora", numbers=MOLORA),
    "malora": Baseline(maker="ours", method="malora", numbers=MALORA),
    "malora_grouped": Baseline(maker="ours", method="malora", numbers=MALORA, computation="grouped"),
    "malora_fused": Baseline(maker="ours", method="malora", numbers=MALORA, fuse_projections=True),
}


class Linear(nn.Module):
    """One linear without bias."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y: Tensor = self.q_proj(x_BTI)
        return y


class Projections(nn.Module):
    """q, k and v of one input, side by side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))

    def forward(self, x_BTI: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x_BTI), self.k_proj(x_BTI), self.v_proj(x_BTI)], dim=-1)


class Block(nn.Module):
    """A Llama of one block, without embedding and head."""

    def __init__(self, hidden: int) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            use_cache=False,
            **heads,
        )
        self.model = LlamaModel(config)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTI: Tensor = self.model(inputs_embeds=x_BTI).last_hidden_state
        return y_BTI


CASES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "linear": (Linear, ("q_proj",)),
    "projections": (Projections, ("q_proj", "k_proj", "v_proj")),
    "block": (Block, DEFAULT_TARGETS),
}


@dataclass(frozen=True)
class LaunchCase:
    """One case on the device: the base that baselines share, and its input (1, T, I)."""

    base: Base
    x_BTI: Tensor

    @classmethod
    def of(cls, case: str, hidden: int, tokens: int, dtype: torch.dtype, *, load_in_4bit: bool) -> "LaunchCase":
        """Draw random weights and numbers; inside of a StrictDevice."""
        module, targets = CASES[case]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x_BTI = module(hidden).to(dtype), torch.randn(1, tokens, hidden).to(TYPE, dtype)
        return cls(Base.of(model.to(TYPE), targets, load_in_4bit=load_in_4bit, peft=False), x_BTI)

    def counts(self, baseline: Baseline, dropout: float, device: StrictDevice) -> Counted:
        """Count launches, waits, atomics and nbytes of a forward and backward, after one that fills what is kept."""
        adapted = build(baseline, self.base, dropout=dropout)
        self._pass(adapted)
        device.counts.reset()
        self._pass(adapted)
        return device.counts.totals()

    def _pass(self, adapted: Adapted) -> None:
        x_BTI = self.x_BTI.detach().requires_grad_()
        keys_T = _keys(x_BTI.shape[1])
        for _, layer in mixture_layers(adapted.model):
            # As training does, once for all layers and not in each.
            layer.token_keys = keys_T
        for parameter in adapted.trained:
            parameter.grad = None
        with kept_weight_copies(adapted.model):
            adapted.model(x_BTI).sum().backward()


def _keys(tokens: int) -> Tensor:
    ids_T = torch.zeros(tokens, dtype=torch.int32, device="cpu")
    return token_keys(0, 1, ids_T, torch.arange(tokens, dtype=torch.int32)).to(TYPE, non_blocking=True)


def above(found: Mapping[str, int], base: Mapping[str, int]) -> Counted:
    """Return what a baseline adds to the base's counts."""
    return {kind: number - base[kind] for kind, number in found.items()}
