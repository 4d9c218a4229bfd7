"""Parameter counts against the paper's LLaMA-2-7B totals (router on every linear; Q, K, V, Gate, Up, Down adapted)."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import MixtureSpec, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters

TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
BASE_PARAMETERS = 6_738_415_616
NUM_BLOCKS = 32
LINEARS = {  # in_features, out_features, how many a block
    "q_proj": (4096, 4096, 3),
    "up_proj": (4096, 11008, 2),
    "down_proj": (11008, 4096, 1),
}

LORA = mixture_spec("lora", r=64)
DORA = mixture_spec("dora", r=64)
MOLORA = mixture_spec("molora", r=8)
MALORA = mixture_spec("malora", r=12, shared_r=32)
SMALL = mixture_spec("malora", r=8, shared_r=22)

TOTALS = [
    pytest.param(LORA, 143_130_624, id="lora-r64"),
    pytest.param(DORA, 144_359_424, id="dora-r64"),
    pytest.param(mixture_spec("molora", r=4), 79_626_240, id="molora-r4"),
    pytest.param(MOLORA, 151_191_552, id="molora-r8"),
    pytest.param(mixture_spec("molora", r=12), 222_756_864, id="molora-r12"),
    pytest.param(mixture_spec("molora", r=16), 294_322_176, id="molora-r16"),
    pytest.param(mixture_spec("molora", r=32), 580_583_424, id="molora-r32"),
    pytest.param(SMALL, 109_142_016, id="malora-small-8-22"),
    pytest.param(mixture_spec("malora", r=6, shared_r=16), 83_312_640, id="malora-6-16"),
    pytest.param(MALORA, 158_859_264, id="malora-12-32"),
    pytest.param(mixture_spec("malora", r=24, shared_r=64), 310_837_248, id="malora-24-64"),
    pytest.param(mixture_spec("malora", r=48, shared_r=128), 618_332_160, id="malora-48-128"),
    pytest.param(mixture_spec("malora", r=14, shared_r=16), 162_152_448, id="malora-14-16"),
    pytest.param(mixture_spec("malora", r=10, shared_r=48), 155_467_776, id="malora-10-48"),
    pytest.param(mixture_spec("malora", r=8, shared_r=64), 151_977_984, id="malora-8-64"),
]


@pytest.mark.parametrize(("spec", "total"), TOTALS)
def test_totals_of_llama_2_7b(spec: MixtureSpec, total: int) -> None:
    assert NUM_BLOCKS * sum(count * count_parameters(spec, n, m) for n, m, count in LINEARS.values()) == total


@pytest.mark.parametrize(
    ("linear", "molora", "malora", "small"),
    [
        ("q_proj", 557_056, 560_128, 386_432),
        ("up_proj", 999_424, 1_223_680, 828_800),
        ("down_proj", 1_054_720, 836_608, 593_792),
    ],
)
def test_counts_of_one_linear(linear: str, molora: int, malora: int, small: int) -> None:
    n, m, _ = LINEARS[linear]
    assert [count_parameters(spec, n, m) for spec in (MOLORA, MALORA, SMALL)] == [molora, malora, small]


@pytest.mark.parametrize(("r", "shared_r"), [(6, 16), (12, 32), (24, 64), (48, 128)])
def test_default_shared_r_is_that_of_the_rank_sweep(r: int, shared_r: int) -> None:
    assert mixture_spec("malora", r=r) == mixture_spec("malora", r=r, shared_r=shared_r)


def _llama_2_7b() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("spec", "total"),
    [
        pytest.param(LORA, 143_130_624, id="lora-r64"),
        pytest.param(DORA, 144_359_424, id="dora-r64"),
        pytest.param(MOLORA, 151_191_552, id="molora-r8"),
        pytest.param(MALORA, 158_859_264, id="malora-12-32"),
        pytest.param(SMALL, 109_142_016, id="malora-small-8-22"),
    ],
)
def test_built_llama_2_7b_has_the_counted_parameters(spec: MixtureSpec, total: int) -> None:
    model = _llama_2_7b()
    assert sum(p.numel() for p in model.parameters()) == BASE_PARAMETERS
    inject_adapters(model, spec, target_modules=TARGETS, seed=0)
    assert sum(p.numel() for p in model.parameters()) == BASE_PARAMETERS + total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
    assert all(p.is_meta for p in model.parameters())
