"""Every baseline on one small model: what is trained, what is shared, and that all start as the base."""

import pytest
import torch

from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters
from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.bench.local.peers.baselines import BASELINES, chosen
from malora_dist.bench.local.peers.build import Base, build, flops_above_base
from malora_dist.errors import ConfigError
from malora_dist.models.nf4_linear import NF4Linear
from tests.tiny_models import tiny_llama

IDS = torch.arange(12).view(2, 6)
SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576)] * 30


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_all_train_their_method_on_one_base(load_in_4bit: bool) -> None:
    base = Base.of(tiny_llama(torch.bfloat16), DEFAULT_TARGETS, load_in_4bit=load_in_4bit, peft=True)
    frozen = {p.data_ptr() for part in (base.ours, base.theirs) for p in part.parameters()}
    assert len(base.sizes) == 12 and base.dtype == torch.bfloat16
    expected = base.ours(IDS).logits
    for name, baseline in BASELINES.items():
        if baseline.computation == "grouped_triton":
            # The kernels are tested where they run: on a GPU, or in a process that starts with Triton's interpreter.
            with pytest.raises(ConfigError, match="grouped_triton needs a CUDA device"):
                build(baseline, base)
            continue
        adapted = build(baseline, base, dropout=0.05)
        spec, model = adapted.spec, adapted.model
        count = 0 if spec is None else sum(count_parameters(spec, *size) for size in base.sizes)
        assert adapted.facts["trainable"] == count, name
        assert all(p.data_ptr() in frozen for p in model.parameters() if not p.requires_grad), name
        ours = baseline.maker == "ours" or baseline.fp32
        assert {p.dtype for p in adapted.trained} <= {torch.float32 if ours else torch.bfloat16}, name
        assert model.training
        theirs = load_in_4bit and baseline.maker == "peft"
        assert flops_above_base({name: adapted}, 5) == ({} if theirs else {name: adapted.flops(5)})
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0.03, atol=0.03, msg=name)
    assert not any(p.requires_grad for p in base.ours.parameters())


def test_forms_and_layers() -> None:
    from peft.tuners.lora.bnb import Linear4bit

    base = Base.of(tiny_llama(), DEFAULT_TARGETS, load_in_4bit=True, peft=True)
    built = {name: build(BASELINES[name], base) for name in ("lora", "malora_grouped", "molora_looped", "peft_lora")}
    assert {name: one.form for name, one in built.items() if one.form} == {
        "malora_grouped": "grouped",
        "molora_looped": "dispatched",
    }
    assert len(built["malora_grouped"].routers) == 12
    fused = build(BASELINES["malora_fused"], base).model
    assert sum(type(module).__name__ == "FusedProjection" for module in fused.modules()) == 4
    kinds = {name: [type(m) for m in one.model.modules()] for name, one in built.items()}
    assert kinds["peft_lora"].count(Linear4bit) == 12 and NF4Linear not in kinds["peft_lora"]
    assert kinds["lora"].count(NF4Linear) == 14, "the head is not quantised"


def test_equal_baselines_train_as_much_as_malora() -> None:
    malora = BASELINES["malora"].spec(SMOLLM2)
    assert malora == mixture_spec("malora", num_experts=8, top_k=2, r=12, shared_r=32)
    assert BASELINES["peft_lora_equal"].spec(SMOLLM2).r == BASELINES["lora_equal"].spec(SMOLLM2).r == 71
    counts = [sum(count_parameters(BASELINES[name].spec(SMOLLM2), *size) for size in SMOLLM2)
              for name in ("malora", "peft_lora_equal", "molora")]  # fmt: skip
    assert counts[1] == pytest.approx(counts[0], rel=0.01) and counts[2] == pytest.approx(counts[0], rel=0.05)


def test_names() -> None:
    assert list(chosen("malora, base")) == ["malora", "base"]
    assert list(chosen("malora_siblings")) == ["malora_fused"], "its name on older command lines"
    assert list(chosen(None)) == list(BASELINES) and list(chosen(None, ["base"])) == ["base"]
    for wrong in ("malora,mylora", ""):
        with pytest.raises(ConfigError, match="--only .* is not one of base, peft_lora"):
            chosen(wrong)
