"""Filling in a method's numbers, and what is refused. The paper's parameter totals are in test_method_tables.py."""

import math
from typing import Any

import pytest
import torch

from malora_dist.adapters.methods import METHODS, default_shared_r, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters, factor_shapes, match_budget
from malora_dist.adapters.scaling import SCALINGS
from malora_dist.errors import ConfigError
from tests.reference import routing_reference, scaling_reference


def test_default_shared_r_is_the_papers() -> None:
    assert [default_shared_r(8, r, 0.5) for r in (6, 12, 24, 48)] == [16, 32, 64, 128]
    assert default_shared_r(8, 8, 1.0) == 64  # lambda = 1: no compression, the sum of all experts' ranks
    assert default_shared_r(1, 1, 0.01) == 1


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("r", [6, 12, 48])
def test_lora_alpha_defaults_to_twice_the_rank(method: str, r: int) -> None:
    spec = mixture_spec(method, r=r)
    assert (spec.lora_alpha, spec.scaling) == (2 * r, 2.0)
    assert mixture_spec(method, r=r, lora_alpha=3.0).scaling == pytest.approx(3 / r)


def test_a_method_keeps_only_the_numbers_it_has() -> None:
    lora = mixture_spec("lora", num_experts=8, top_k=2, r=64, shared_r=32)
    assert (lora.num_experts, lora.top_k, lora.shared_r) == (1, 1, None)
    molora = mixture_spec("molora", num_experts=6, top_k=3, r=8, shared_r=1)
    assert (molora.num_experts, molora.top_k, molora.shared_r) == (6, 3, None)
    malora = mixture_spec("malora", num_experts=6, top_k=3, r=8, shared_r=11)
    assert (malora.num_experts, malora.top_k, malora.shared_r) == (6, 3, 11)
    hydralora = mixture_spec("hydralora", num_experts=6, top_k=3, r=8, shared_r=11)
    assert (hydralora.num_experts, hydralora.top_k, hydralora.shared_r) == (6, 6, 8)
    dora = mixture_spec("dora", num_experts=8, r=64, shared_r=32)
    assert (dora.num_experts, dora.top_k, dora.shared_r) == (1, 1, None)


def test_rank_stabilised_scaling() -> None:
    assert mixture_spec("malora", r=16, lora_alpha=8, use_rslora=True).scaling == 2.0
    assert mixture_spec("malora", r=16, lora_alpha=8).scaling == 0.5


@pytest.mark.parametrize("rule", list(SCALINGS))
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", ["malora", "molora", "hydralora"])
def test_the_scale_equals_the_twin(method: str, normalize: bool, rule: str) -> None:
    """With the gates that a uniform router gives, whatever their number."""
    spec = mixture_spec(method, num_experts=6, top_k=3, r=9, lora_alpha=5, normalize_gates=normalize, scaling_rule=rule)
    gates_TK, _, _ = routing_reference(torch.ones(1, 4), torch.zeros(6, 4), spec.top_k, normalize)
    assert spec.scaling == pytest.approx(scaling_reference(rule, 5, 9, gates_TK[0].tolist()))


def test_without_gates_there_is_nothing_to_align() -> None:
    assert mixture_spec("lora", r=4, scaling_rule="gate_norm").scaling == mixture_spec("lora", r=4).scaling == 2.0
    with pytest.raises(ConfigError, match="scaling='goat' must be one of lora, rslora"):
        mixture_spec("malora", scaling_rule="goat")


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        ("lora", {"A": (1, 3, 20), "B": (1, 30, 3)}),
        ("dora", {"A": (1, 3, 20), "B": (1, 30, 3), "magnitude": (30,)}),
        ("hydralora", {"gate": (5, 20), "shared_A": (3, 20), "B": (5, 30, 3)}),
        ("molora", {"gate": (5, 20), "A": (5, 3, 20), "B": (5, 30, 3)}),
        ("malora", {"gate": (5, 20), "shared_A": (7, 20), "P": (5, 3, 7), "B": (5, 30, 3)}),
    ],
)
def test_factors_of_a_method(method: str, shapes: dict[str, tuple[int, ...]]) -> None:
    spec = mixture_spec(method, num_experts=5, r=3, shared_r=7)
    assert factor_shapes(spec, 20, 30) == shapes
    assert count_parameters(spec, 20, 30) == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(("method", "width"), [("malora", 7), ("hydralora", 3), ("molora", 20), ("lora", None)])
def test_a_router_that_reads_h_is_as_wide_as_the_experts_input(method: str, width: int | None) -> None:
    """CoMoL drops N (n - d) numbers; methods without S_A have no h that the router could read."""
    spec = mixture_spec(method, num_experts=5, r=3, shared_r=7, router_input="h")
    plain = mixture_spec(method, num_experts=5, r=3, shared_r=7)
    assert factor_shapes(spec, 20, 30).get("gate", (0, None))[1] == width
    saved = 0 if width is None else 5 * (20 - width)
    assert count_parameters(plain, 20, 30) - count_parameters(spec, 20, 30) == saved


@pytest.mark.parametrize(
    ("method", "numbers", "named"),
    [
        ("newlora", {}, ["method='newlora'", "lora", "molora", "malora"]),
        ("malora", {"r": 0}, ["r=0"]),
        ("lora", {"r": -1}, ["r=-1"]),
        ("molora", {"num_experts": 0}, ["num_experts=0"]),
        ("molora", {"top_k": 0}, ["top_k=0"]),
        ("malora", {"num_experts": 4, "top_k": 5}, ["num_experts=4", "top_k=5"]),
        ("malora", {"r": 12, "shared_r": 11}, ["shared_r=11", "r=12"]),
        ("malora", {"num_experts": 2, "top_k": 1, "r": 12}, ["shared_r=8", "r=12"]),
        ("malora", {"router_input": "y"}, ["router_input='y'", "x, h"]),
        ("malora", {"router_dtype": "bf16"}, ["router_dtype='bf16'", "float32, input"]),
    ],
)
def test_impossible_numbers_are_named(method: str, numbers: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        mixture_spec(method, **numbers)
    assert all(name in str(caught.value) for name in named), str(caught.value)


SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576)] * 30


def total(method: str, **numbers: Any) -> int:
    return sum(count_parameters(mixture_spec(method, **numbers), *size) for size in SMOLLM2)


def test_equal_budget_on_smollm2() -> None:
    """The smallest model's six targets: MALoRA with the paper's defaults costs as much as LoRA of rank 71."""
    assert match_budget("lora", SMOLLM2, total("malora", r=12)).r == 71
    spec = match_budget("malora", SMOLLM2, total("malora", r=12), num_experts=8, top_k=2)
    assert (spec.r, spec.shared_r, spec.num_experts, spec.top_k) == (12, 32, 8, 2)


@pytest.mark.parametrize("method", list(METHODS))
def test_budget_takes_the_nearest_rank(method: str) -> None:
    exact, above = total(method, r=9), total(method, r=10)
    assert match_budget(method, SMOLLM2, exact).r == 9
    assert match_budget(method, SMOLLM2, (exact + above) // 2).r == 9
    assert match_budget(method, SMOLLM2, (exact + above) // 2 + 1).r == 10
    assert match_budget(method, SMOLLM2, 1).r == 1


@pytest.mark.parametrize(("num_experts", "top_k", "r"), [(16, 4, 6), (24, 6, 4)])
def test_finer_experts_cost_the_same(num_experts: int, top_k: int, r: int) -> None:
    """More experts of lower rank, as many ranks in all and in each token: the budget gives r, shared_r the rest."""
    budget = total("malora", r=12)
    finer = {"num_experts": num_experts, "top_k": top_k}
    assert match_budget("malora", SMOLLM2, budget, **finer).r == r and r * num_experts == 12 * 8
    by_rank = {d: total("malora", r=r, shared_r=d, **finer) for d in range(r, 60)}
    d, nearest = min(by_rank.items(), key=lambda item: abs(item[1] - budget))
    assert abs(nearest / budget - 1) < 0.01 and d > r
    # What changes is N n of the routers, and N r d of P for the rank d of S_A.
    inputs = sum(n for n, _ in SMOLLM2)
    assert nearest - budget == inputs * (num_experts - 8 + d - 32) + len(SMOLLM2) * 96 * (d - 32)


def test_budget_out_of_reach_of_a_fixed_shared_r() -> None:
    assert match_budget("malora", SMOLLM2, total("malora", r=6, shared_r=8), shared_r=8).r == 6
    with pytest.raises(ConfigError, match="shared_r=8"):
        match_budget("malora", SMOLLM2, total("malora", r=12), shared_r=8)
