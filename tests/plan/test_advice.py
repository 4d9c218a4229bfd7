"""What is advised, and that each advice holds where it is followed."""

import pytest

from malora_dist.config import RunConfig
from malora_dist.config.summary import adapter_spec
from malora_dist.plan import Lengths, Report
from malora_dist.plan.advice import fastest_that_fits
from malora_dist.plan.duration import Hardware
from malora_dist.plan.shapes import ModelShape
from malora_dist.plan.units import GIB


def report(config: RunConfig, shape: ModelShape, **hardware: int) -> Report:
    return Report(config, adapter_spec(config), shape, Hardware(**hardware), Lengths())


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_the_fastest_plan_advises_no_other(llama_config: RunConfig, llama_shape: ModelShape) -> None:
    first = report(llama_config, llama_shape)
    best = fastest_that_fits(first.plans)
    assert best is first.plans[0]
    assert any("The fastest legal plan that fits is zero_stage=0" in line for line in first.advice)
    followed = changed(llama_config, "parallel", zero_stage=0)
    train = {"gradient_checkpointing": False, "per_device_train_batch_size": best.run.micro_batch}
    second = report(changed(followed, "train", **train), llama_shape)
    assert "It is the fastest legal plan that fits." in second.advice
    assert second.chosen.seconds == best.seconds


def test_a_small_gpu_gets_another_plan(llama_config: RunConfig, llama_shape: ModelShape) -> None:
    """24 GiB: without recomputation only one sample fits at a time; 4 GiB: nothing does."""
    small = report(changed(llama_config, "data", max_seq_length=4096), llama_shape, hbm=24 * GIB)
    best = fastest_that_fits(small.plans)
    assert best is not None and best is not small.plans[0] and not small.plans[0].fits
    none = report(llama_config, llama_shape, hbm=4 * GIB)
    assert not none.chosen.fits and fastest_that_fits(none.plans) is None
    assert "does not fit" in none.advice[0] and "No legal plan of this batch fits" in none.advice[1]


@pytest.mark.parametrize(("length", "num_experts", "r", "cheaper"), [(1024, 8, 12, "weights"), (16, 256, 64, "tokens")])
def test_weights_or_tokens(
    llama_config: RunConfig, llama_shape: ModelShape, length: int, num_experts: int, r: int, cheaper: str
) -> None:
    """The sentence follows the bytes, which follow the rule N r < 2/3 T q."""
    config = changed(llama_config, "adapter", num_experts=num_experts, r=r, shared_r=512 if r > 32 else 32)
    result = report(changed(config, "data", max_seq_length=length), llama_shape)
    (sentence,) = [line for line in result.advice if line.startswith("Moving")]
    assert sentence.startswith(f"Moving {cheaper} is cheaper")
    left, right = sentence.split("here ")[1].split(" (T ")[0].split(" against ")
    assert (float(left) < float(right)) == (cheaper == "weights")


def test_the_gradient_bucket_that_is_advised_is_enough(llama_config: RunConfig, llama_shape: ModelShape) -> None:
    (sentence,) = [line for line in report(llama_config, llama_shape).advice if "gradient bucket" in line]
    assert "1.86 GiB" in sentence and "reduce_bucket_size=158859264" in sentence


def test_one_process_has_nothing_to_move(llama_config: RunConfig, llama_shape: ModelShape) -> None:
    result = report(llama_config, llama_shape, gpus_per_node=1)
    assert not any(word in line for line in result.advice for word in ("Moving", "gathers the 4-bit base"))
    assert not any(result.chosen.traffic.values())
