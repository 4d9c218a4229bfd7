"""train.optim: names, what is refused in words, what a checkpoint allows, what the plan counts."""

from collections.abc import Iterator
from unittest import mock

import pytest

from malora_dist.config import RunConfig, config_from_dict, plain_config
from malora_dist.config.compatibility import check_plan
from malora_dist.config.deepspeed import deepspeed_config
from malora_dist.config.resume_compatibility import changes
from malora_dist.config.summary import adapter_spec
from malora_dist.config.template import recipe_text
from malora_dist.errors import ConfigError, MaloraError
from malora_dist.optimizers.registry import OPTIMIZERS, optimizer_spec, spec_of_kind
from malora_dist.plan.families import family_shape
from malora_dist.plan.parameters import state_bytes, trainable_parameters
from malora_dist.plan.run import Lengths, Run, run_of
from tests.config.recipes import recipe
from tests.optimizers.made_up import MADE_UP

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 61}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def config(optim: str | None = None, **parallel: int) -> RunConfig:
    train = {} if optim is None else {"optim": optim}
    return config_from_dict(recipe(train=train, parallel=parallel))


def plan(optim: str, world_size: int = 2, **parallel: int) -> Run:
    chosen = config(optim, **parallel)
    return run_of(chosen, adapter_spec(chosen), family_shape(LLAMA, "here"), world_size, lengths=Lengths())


@pytest.fixture
def with_made_up() -> Iterator[None]:
    with mock.patch.dict(OPTIMIZERS, {MADE_UP.name: MADE_UP}):
        yield


def test_names() -> None:
    assert config().train.optim == "adamw_torch"
    assert config("adamw_torch_fused").train.optim == "adamw_torch"
    assert config("adamw_bnb_8bit").train.optim == "adamw_8bit"
    assert config_from_dict(recipe(train={"optimizer": "adafactor"})).train.optim == "adafactor"
    with pytest.raises(ConfigError, match=r"train.optim='lion': must be one of adamw_torch, adamw_8bit, adafactor"):
        config("lion")
    kinds = [spec.kind for spec in OPTIMIZERS.values()]
    assert len(set(kinds)) == len(kinds) and [spec_of_kind(kind) for kind in kinds] == list(OPTIMIZERS.values())
    assert spec_of_kind("lion") is None and spec_of_kind(["AdamW"]) is None


def test_the_recipe_of_init_names_all() -> None:
    text = recipe_text()
    assert "#optim: adamw_torch" in text and all(name in text for name in OPTIMIZERS)


def test_settings_that_it_does_not_read_are_refused() -> None:
    train = {"optim": "adafactor", "adam_beta1": 0.8}
    with pytest.raises(ConfigError, match=r"train.adam_beta1=0.8: has no meaning for train.optim=adafactor"):
        config_from_dict(recipe(train=train))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whole_tensor_optimizers_are_refused_where_zero_flattens(stage: int) -> None:
    words = (
        rf"train.optim=adafactor is refused at parallel.zero_stage={stage}, .*parallel.zero_stage: 0, or train.optim"
    )
    with pytest.raises(ConfigError, match=words):
        check_plan(config("adafactor", zero_stage=stage), 2)
    check_plan(config("adamw_8bit", zero_stage=stage), 2)


def test_whole_tensor_optimizers_are_refused_with_slices_of_experts() -> None:
    check_plan(config("adafactor", zero_stage=0), 2)
    with pytest.raises(MaloraError, match=r"train.optim=adafactor is refused at parallel.ep_size=2, .*ep_size: 1, or"):
        check_plan(config("adafactor", zero_stage=0, ep_size=2), 2)
    check_plan(config("adamw_8bit", zero_stage=0, ep_size=2), 2)


def test_another_optimizer_is_another_run() -> None:
    (change,) = changes(plain_config(config()), plain_config(config("adamw_8bit")))
    assert (change.key, change.kind) == ("train.optim", "refused")
    assert changes(plain_config(config("adamw_torch_fused")), plain_config(config())) == []


def test_deepspeed_is_told() -> None:
    assert deepspeed_config(config("adamw_8bit", zero_stage=2), 2)["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in deepspeed_config(config("adafactor", zero_stage=0), 2)


def test_the_plan_counts_their_state() -> None:
    for stage in range(4):
        moments, codes = (state_bytes(plan(name, zero_stage=stage)) for name in ("adamw_torch", "adamw_8bit"))
        assert moments >= 8 * trainable_parameters(plan("adamw_torch")) // (1 if stage == 0 else 2)
        # A byte and a 256th of a scale instead of four; small tensors are not quantised.
        assert 0.25 < codes / moments < (0.6 if stage == 0 else 0.26)
    assert state_bytes(plan("adafactor", zero_stage=0)) < state_bytes(plan("adamw_torch", zero_stage=0)) / 4


def test_a_row_alone_is_an_optimizer(with_made_up: None) -> None:
    """For recipe, plan and DeepSpeed; test_runs trains, saves and resumes it."""
    chosen = config("made_up", zero_stage=2)
    check_plan(chosen, 2)
    assert optimizer_spec("made_up") is MADE_UP
    assert 2 * state_bytes(plan("made_up", zero_stage=2)) == state_bytes(plan("adamw_torch", zero_stage=2))
    assert deepspeed_config(chosen, 2)["zero_allow_untested_optimizer"] is True
    with pytest.raises(ConfigError, match="train.adam_epsilon=0.1: has no meaning for train.optim=made_up"):
        config_from_dict(recipe(train={"optim": "made_up", "adam_epsilon": 0.1}))
