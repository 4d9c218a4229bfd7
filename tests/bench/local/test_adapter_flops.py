"""FLOPs by formula against those that torch counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from malora_dist.adapters.methods import mixture_spec
from malora_dist.bench.local.adapter_flops import BASE, GEMM, adapter_flops, base_gemm, with_shares
from malora_dist.bench.local.layer import OneLinear, Pass
from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.local.peers.build import Adapted, Base, build
from malora_dist.bench.local.timing import records_of

T, I, O = 40, 96, 72  # noqa: E741


def _addmm_flops(into: Any, a: Any, b: Any, **_: Any) -> int:
    """The counter does not know the product that adds in place."""
    return 2 * a[0] * a[1] * b[1]


def counted(adapted: Adapted) -> int:
    one = Pass(adapted, torch.randn(T, I), torch.randn(T, O))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        one()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["peft_lora", "lora", "malora", "malora_looped", "molora_looped"])
def test_equals_what_torch_counts(name: str) -> None:
    base = Base.of(OneLinear(I, O, torch.float32, torch.device("cpu")), ["linear"], load_in_4bit=False, peft=True)
    adapted = build(BASELINES[name], base)
    assert adapted.flops(T) == counted(adapted) - counted(build(BASELINES["base"], base))


def test_only_chosen_experts_count_where_the_others_are_left_out() -> None:
    spec = mixture_spec("malora", num_experts=8, top_k=2, r=3, shared_r=4)
    experts, projection = 8 * 3 * 4 + 8 * O * 3, 8 * I + 4 * I
    assert adapter_flops(spec, [(I, O)] * 2, T, all_experts=True) == 12 * T * (experts + projection)
    assert adapter_flops(spec, [(I, O)] * 2, T, all_experts=False) == 12 * T * (experts // 4 + projection)


def test_shares() -> None:
    _, gemm_flops = base_gemm([(I, O), (O, I)], T, torch.float32, torch.device("cpu"))
    assert gemm_flops == 4 * T * I * O
    times = {BASE: [1.0, 3.0, 2.0], "lora": [2.0, 5.0, 4.0], GEMM: [0.5, 0.5, 0.5]}
    base, lora, gemm = with_shares(records_of("case", times, BASE), times, {"lora": 300, GEMM: 100})
    assert gemm.facts == {"GFLOP/s": 200 / 1e9} and gemm.ratio is None and base.facts == {}
    assert lora.facts == {"adapter ms": 2000.0, "FLOPs ms": 1500.0, "adapter / FLOPs": pytest.approx(4 / 3)}
    alone = {name: times[name] for name in ("lora", GEMM)}
    assert with_shares(records_of("case", alone, "lora"), alone, {"lora": 300, GEMM: 100})[0].facts == {}
