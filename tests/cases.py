"""Odd shapes and odd routings for adapter tests, and the tensors that go with them."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

Routing = Literal["free", "starved", "one_expert", "equal"]

DROPOUT_P = 0.25  # the share of `mask` that is 0
_FORCED_LOGIT = 8.0  # far above what the random part of a logit reaches, small enough that softmax keeps gradients


@dataclass(frozen=True)
class AdapterCase:
    """One layer: T tokens, I in, O out, E experts, K a token, rank r, shared rank D.

    routing: free = random; starved = the last expert gets no token; one_expert = every token's first choice is expert
    E - 1 (the only choice where K = 1); equal = all logits are 0.
    """

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    K: int
    r: int
    D: int
    routing: Routing = "free"

    def __post_init__(self) -> None:
        assert 1 <= self.K <= self.E
        assert self.routing != "starved" or self.K < self.E


CASES = {
    #                              T   I   O  E  K  r   D
    "plain":         AdapterCase( 16, 32, 24, 8, 2, 4, 10),
    "no-token":      AdapterCase(  0,  8,  6, 4, 2, 3,  5),
    "one-token":     AdapterCase(  1,  7,  5, 4, 2, 3,  5),
    "primes":        AdapterCase( 37, 13, 11, 7, 3, 5, 12),
    "one-expert":    AdapterCase(  9,  6, 10, 1, 1, 2,  4),
    "k1":            AdapterCase( 11, 12,  9, 5, 1, 3,  7),
    "k3":            AdapterCase( 11, 12,  9, 5, 3, 3,  7),
    "k-all":         AdapterCase( 11, 12,  9, 5, 5, 3,  7),
    "r1-d1":         AdapterCase(  6,  5,  4, 3, 2, 1,  1),
    "d-above-in":    AdapterCase(  6,  5,  4, 3, 2, 4,  9),
    "out-1":         AdapterCase(  5,  9,  1, 3, 2, 2,  6),
    "fewer-tokens":  AdapterCase(  3, 10,  8, 8, 1, 2,  6),
    "more-tokens":   AdapterCase(130, 17, 19, 6, 2, 3,  8),
    "unused-expert": AdapterCase( 20, 12,  9, 5, 2, 3,  7, routing="starved"),
    "all-on-one":    AdapterCase( 20, 12,  9, 5, 1, 3,  7, routing="one_expert"),
    "all-on-one-k2": AdapterCase( 20, 12,  9, 5, 2, 3,  7, routing="one_expert"),
    "equal-logits":  AdapterCase( 10, 12,  9, 5, 2, 3,  7, routing="equal"),
    "equal-k-all":   AdapterCase( 10, 12,  9, 5, 5, 3,  7, routing="equal"),
}  # fmt: skip

ADAPTER_CASES = [pytest.param(case, id=name) for name, case in CASES.items()]


def _gate(case: AdapterCase, gate_EI: Tensor) -> Tensor:
    """Rows that force the routing through feature 0, which `make_inputs` holds at 1 for every token."""
    if case.routing == "equal":
        return torch.zeros_like(gate_EI)
    if case.routing == "starved":
        gate_EI[-1, 0] -= _FORCED_LOGIT
    if case.routing == "one_expert":
        gate_EI[-1, 0] += _FORCED_LOGIT
    return gate_EI


def make_inputs(case: AdapterCase, method: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Leaves that require gradients, and `mask`, as `adapter_reference` wants them.

    x (T, I), base (T, O), mask (T, I) of 0 and 1, B (E, O, r) not zero; malora: gate (E, I), shared_A (D, I),
    P (E, r, D); molora: gate (E, I), A (E, r, I); hydralora: gate (E, I), shared_A (r, I); lora and dora: A (1, r, I),
    B (1, O, r), for dora magnitude (O,). Drawn in float64, then cast.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    one = method in ("lora", "dora")
    num_experts = 1 if one else case.E
    tensors = {"x": normal(case.T, case.I) * math.sqrt(case.I), "base": normal(case.T, case.O)}
    tensors["x"][:, 0] = 1.0
    mask = (torch.rand(case.T, case.I, generator=generator) >= DROPOUT_P).to(dtype)
    if not one:
        tensors["gate"] = _gate(case, normal(case.E, case.I))
    if method == "malora":
        tensors |= {"shared_A": normal(case.D, case.I), "P": normal(num_experts, case.r, case.D)}
    elif method == "hydralora":
        tensors["shared_A"] = normal(case.r, case.I)
    else:
        tensors["A"] = normal(num_experts, case.r, case.I)
    tensors["B"] = normal(num_experts, case.O, case.r)
    if method == "dora":
        tensors["magnitude"] = normal(case.O).abs() + 0.5
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()} | {"mask": mask}


def output_gradient(case: AdapterCase, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A random (T, O) to back-propagate: a plain sum would hide swapped rows and columns."""
    return torch.randn(case.T, case.O, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
