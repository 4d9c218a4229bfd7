"""Equal parameters: ranks are solved for as `match_budget` does, and every number is checked."""

from pathlib import Path

import pytest

from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters, match_budget
from malora_dist.errors import ConfigError
from tests.bench.quality.suites import TINY, tiny_bench

ADAPTED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def test_ranks_are_those_of_match_budget(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    run_sizes = [
        (linear.in_features, linear.out_features)
        for linear in shape_of(bench.model)
        if linear.name in ADAPTED
        for _ in range(layers_of(bench.model))
    ]
    wanted = sum(count_parameters(mixture_spec("molora", num_experts=4, r=2), *size) for size in run_sizes)
    assert bench.parameters["molora"] == wanted
    assert bench.recipes["lora"]["adapter"]["r"] == match_budget("lora", run_sizes, wanted).r
    assert abs(bench.parameters["lora"] / wanted - 1) < 0.1


def test_a_method_outside_of_the_tolerance_is_refused(tmp_path: Path) -> None:
    small = {"name": "small", "rates": [0.001], "share": 0.5, "recipe": {"adapter": {"method": "lora", "r": 16}}}
    with pytest.raises(ConfigError, match=r"small has .* trainable parameters, \+.*budget.tolerance=0.1"):
        tiny_bench(tmp_path, TINY | {"methods": [*TINY["methods"], small]})
    free = small | {"in_budget": False}
    assert tiny_bench(tmp_path, TINY | {"methods": [*TINY["methods"], free]}).recipes["small"]["adapter"]["r"] == 16


def test_a_method_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    wrong = {"name": "wrong", "rates": [0.001], "recipe": {"adapter": {"methd": "lora"}}}
    with pytest.raises(ConfigError, match="suite tiny: recipe: adapter.methd='lora': unknown key; did you mean method"):
        tiny_bench(tmp_path, TINY | {"methods": [*TINY["methods"], wrong]})


def shape_of(model: str):  # type: ignore[no-untyped-def]
    from malora_dist.plan.find_shape import find_shape

    return find_shape(model).linears


def layers_of(model: str) -> int:
    from malora_dist.plan.find_shape import find_shape

    return find_shape(model).num_layers
