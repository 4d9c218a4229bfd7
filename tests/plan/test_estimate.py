"""The plans beside a plan: all legal ones, none else, and their order."""

from dataclasses import replace
from pathlib import Path

import pytest

from malora_dist.config import RunConfig
from malora_dist.config.summary import adapter_spec
from malora_dist.plan.duration import Hardware
from malora_dist.plan.estimate import Estimate, alternatives
from malora_dist.plan.run import Lengths, Run, run_of
from malora_dist.plan.shapes import ModelShape

EIGHT = Hardware()


def plans(config: RunConfig, shape: ModelShape, hardware: Hardware = EIGHT) -> list[Estimate]:
    return alternatives(config, adapter_spec(config), shape, hardware, Lengths())


def test_every_legal_plan_once_the_fastest_first(llama_config: RunConfig, llama_shape: ModelShape) -> None:
    """16 samples on 8 ranks: 2 micro-batch sizes, recomputation or not, 4 stages of ZeRO, 4 sizes of ep."""
    found = plans(llama_config, llama_shape)
    assert len({tuple(plan.settings.values()) for plan in found}) == len(found) == 2 * 2 * 4 * 4
    assert all(plan.run.micro_batch * plan.run.accumulation * 8 == 16 for plan in found)
    seconds = [plan.seconds["total"] for plan in found]
    assert seconds == sorted(seconds)


def test_lora_has_no_experts_to_spread(llama_shape: ModelShape, lora_config: RunConfig) -> None:
    assert {plan.run.ep_size for plan in plans(lora_config, llama_shape)} == {1}


def test_a_deepspeed_file_is_followed_where_it_can_be(
    llama_config: RunConfig, llama_shape: ModelShape, tmp_path: Path
) -> None:
    """Offload holds at the stages that have it; a stage named in the file does not hide the others."""
    file = tmp_path / "ds.json"
    file.write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7, "stage3_param_persistence_threshold": 10,'
        ' "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}'
    )
    parallel = llama_config.parallel.model_copy(update={"ds_config": str(file)})
    config = llama_config.model_copy(update={"parallel": parallel})
    run = run_of(config, adapter_spec(config), llama_shape, 8)
    assert run.zero.persistence_threshold == 10 and run.zero.reduce_bucket_size == 50_000_000
    found = plans(config, llama_shape)
    assert {plan.run.zero_stage for plan in found} == {0, 1, 2, 3}
    for plan in found:
        host = plan.host_memory
        assert (host["moments"] > 0) == (plan.run.zero_stage >= 1) == (plan.memory["moments"] == 0)
        assert (host["base_4bit"] > 0) == (plan.run.zero_stage == 3) == (plan.memory["base_4bit"] == 0)


def test_totals_and_what_fits(llama_run: Run) -> None:
    estimate = Estimate(llama_run, EIGHT)
    total = estimate.memory["total"]
    assert total == sum(size for kind, size in estimate.memory.items() if kind != "total")
    assert Estimate(llama_run, replace(EIGHT, hbm=round(total / 0.93))).fits
    assert not Estimate(llama_run, replace(EIGHT, hbm=round(total / 0.95))).fits
    step_tokens = llama_run.tokens * llama_run.accumulation
    assert estimate.tokens_per_second == pytest.approx(step_tokens / estimate.seconds["total"])
