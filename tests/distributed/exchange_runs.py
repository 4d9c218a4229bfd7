"""Linears of one input computed through the exchange, and by the naive twin on one rank's own tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.expert_parallel import connect_experts, keep_local_experts
from malora_dist.ops.dropout import dropout_mask, token_keys
from tests.cases import DROPOUT_P
from tests.distributed.exchange_cases import DTYPES, ExchangeCase
from tests.reference import adapter_reference, gradients

SALT, SCALING = 77, 1.5
NAMES = ("q_proj", "k_proj", "v_proj")  # linears of one parent that have these names send together

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """Outputs and gradients by name, bytes sent by phase as AllToAll counts them, and every message's real bytes."""

    values: Values
    sent_bytes: dict[str, int]
    messages: list[int]


@contextmanager
def recorded_messages() -> Iterator[list[int]]:
    """The bytes for other ranks in every tensor handed to `all_to_all_single`, in order."""
    messages: list[int] = []
    original = dist.all_to_all_single

    def record(
        output: Tensor, rows: Tensor, received: Any = None, sent: Any = None, group: Any = None, **rest: Any
    ) -> Any:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        parts = rows.split(sent or [len(rows) // size] * size)
        messages.append(sum(part.numel() * part.element_size() for w, part in enumerate(parts) if w != rank))
        return original(output, rows, received, sent, group=group, **rest)

    with patch.object(dist, "all_to_all_single", record):
        yield messages


class _Base(nn.Module):
    """W0 x plus a given output (T, O), whose gradient can then be asked for."""

    def __init__(self, in_features: int, output: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(output.new_empty(output.shape[1], in_features), requires_grad=False)
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.output


def _keys(num_tokens: int, rank: int) -> Tensor:
    return token_keys(1, 2, torch.arange(num_tokens) // 3 + 50 * rank, torch.arange(num_tokens) % 3)


def _spec(case: ExchangeCase) -> MixtureSpec:
    sizes = {"num_experts": case.E, "top_k": case.K, "r": case.r, "shared_r": case.D}
    scale = {"lora_alpha": SCALING * case.r, "beta": 1.0}
    return MixtureSpec(method=case.method, **sizes, **scale, normalize_gates=case.normalize)


def _layer(case: ExchangeCase, tensors: Values, rank: int) -> MixtureLinear:
    """A training layer with all experts, parameters as the product keeps them: adapters in fp32, the base in dtype."""
    dtype = DTYPES[case.dtype]
    wide = torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        layer = MixtureLinear(
            _Base(case.I, tensors["base"]),
            _spec(case),
            in_features=case.I,
            out_features=tensors["base"].shape[1],
            dropout=DROPOUT_P if case.dropout else 0.0,
            computation=case.computation,
            input_salt=SALT,
        )
    places = {"gate": "input_projection.gate", "shared_A": "input_projection.shared_A", "weight": "base_layer.weight"}
    places["base"] = "base_layer.output"
    dtypes = {"weight": dtype, "base": dtype}
    state = {places.get(name, name): t.to(dtypes.get(name, wide)) for name, t in tensors.items() if name != "x"}
    layer.load_state_dict(state, assign=True)
    layer.token_keys = _keys(len(tensors["x"]), rank)
    return layer


def run(
    case: ExchangeCase,
    own: Sequence[Values],
    rank: int,
    groups: ExpertGroups,
    *,
    overlap: bool = True,
    share: bool = True,
    recompute: bool = False,
) -> Run:
    """Forward and backward of all layers through the exchange, in one autograd graph."""
    x = own[0]["x"].to(DTYPES[case.dtype]).requires_grad_()
    layers = nn.ModuleDict({name: _layer(case, tensors, rank) for name, tensors in zip(NAMES, own, strict=False)})
    for layer in layers.values():
        keep_local_experts(layer, groups)
    all_to_all = connect_experts(layers, groups, overlap=overlap, share=share)

    def forward(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers.values()]

    leaves = {"x": x}
    for number, layer in enumerate(layers.values()):
        leaves[f"{number}.base"] = layer.base_layer.output
        leaves |= {f"{number}.{name.removeprefix('input_projection.')}": p for name, p in layer.factors()}
    with recorded_messages() as messages:
        outputs = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        directions = [_direction(y) for y in outputs]
        # Without allow_unused: a rank's backward must touch every parameter, or ZeRO-3 hangs.
        found = torch.autograd.grad(outputs, list(leaves.values()), directions)
    values = {f"{number}.y": y.detach() for number, y in enumerate(outputs)} | dict(zip(leaves, found, strict=True))
    return Run(values, dict(all_to_all.sent_bytes), messages)


def _direction(output: Tensor) -> Tensor:
    """A random tensor to back-propagate, rounded as the output is."""
    generator = torch.Generator().manual_seed(output.shape[1])
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(output.dtype)


def twin(case: ExchangeCase, own: Sequence[Values], rank: int, groups: ExpertGroups) -> Values:
    """The same values by the naive reference with all experts here.

    Everything follows from the rank's own tokens, except the gradients of experts: these are summed over the group, as
    if all its tokens had been here, and sliced to the rank's experts.
    """
    leaves = {"x": own[0]["x"].clone().requires_grad_()}
    outputs = []
    for number, tensors in enumerate(own):
        factors = {name: t.clone().requires_grad_() for name, t in tensors.items() if name not in ("x", "weight")}
        leaves |= {f"{number}.{name}": leaf for name, leaf in factors.items()}
        inputs = factors | {"x": leaves["x"], "base": F.linear(leaves["x"], tensors["weight"]) + factors["base"]}
        if case.dropout:
            inputs["mask"] = dropout_mask(_keys(len(leaves["x"]), rank), SALT, case.I, DROPOUT_P).bool().double()
        outputs.append(
            adapter_reference(
                case.method,
                inputs,
                top_k=case.K,
                scaling=SCALING,
                normalize=case.normalize,
                dropout_p=DROPOUT_P if case.dropout else 0.0,
            )
        )
    direction = torch.cat([_direction(y).flatten() for y in outputs])
    found = gradients(torch.cat([y.flatten() for y in outputs]), list(leaves.values()), direction)
    values = {f"{number}.y": y.detach() for number, y in enumerate(outputs)} | dict(zip(leaves, found, strict=True))
    owned = groups.local_experts(case.E)
    for name in values:
        if name.endswith((".P", ".A", ".B")):
            total = values[name].contiguous()
            dist.all_reduce(total, group=groups.expert_parallel)
            values[name] = total[owned.start : owned.stop]
    return values
