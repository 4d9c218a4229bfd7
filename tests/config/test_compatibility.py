import json
from pathlib import Path
from typing import Any

import pytest

from malora_dist.config import RunConfig, config_from_dict
from malora_dist.config.compatibility import TESTED_VERSIONS, check_plan, installed_deepspeed, suggest_world_sizes
from malora_dist.errors import ConfigError, TopologyError
from tests.config.recipes import recipe


def config(*overrides: str, **sections: dict[str, Any]) -> RunConfig:
    return config_from_dict(recipe(**sections), overrides)


def test_plan() -> None:
    plan = check_plan(config(), 2)
    assert (
        plan.gradient_accumulation_steps == 2 and plan.deepspeed_version == installed_deepspeed() and plan.notes == ()
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_is_a_plan(stage: int) -> None:
    notes = check_plan(config(f"parallel.zero_stage={stage}"), 4).notes
    assert any("parallel.zero_stage: 3" in note for note in notes) == (stage < 3)


@pytest.mark.parametrize(
    ("version", "works"),
    [("0.19.6", False), ("0.19.7", True), ("0.19.9", True), ("0.19.8+cu", True), ("0.20.0", False)],
)
def test_versions(version: str, works: bool) -> None:
    if not works:
        with pytest.raises(ConfigError, match=f"deepspeed {version} .*deepspeed==0.19.8"):
            check_plan(config(), 2, deepspeed_version=version)
    else:
        notes = check_plan(config("parallel.zero_stage=2"), 2, deepspeed_version=version).notes
        assert any("tested are 0.19.7" in note for note in notes) == (version not in TESTED_VERSIONS)
        check_plan(config("parallel.ep_size=2", "parallel.zero_stage=2"), 2, deepspeed_version=version)


def test_zero3_needs_a_version_that_waits_for_its_gathers() -> None:
    check_plan(config("parallel.zero_stage=3"), 2, deepspeed_version="0.19.8")
    with pytest.raises(ConfigError, match="zero_stage=3 is refused with deepspeed 0.19.7.* deepspeed==0.19.8, or"):
        check_plan(config("parallel.zero_stage=3"), 2, deepspeed_version="0.19.7")


def test_no_deepspeed_here_is_a_note() -> None:
    assert "not installed" in check_plan(config(), 2, deepspeed_version=None).notes[0]


def test_batches() -> None:
    with pytest.raises(TopologyError, match="Nearest that work: global_batch_size 12 or 24, 2 or 4 processes"):
        check_plan(config(), 3)
    with pytest.raises(
        TopologyError, match="gradient_accumulation_steps=3 contradicts .*set it to 2.*batch_size to 24"
    ):
        check_plan(config("train.gradient_accumulation_steps=3"), 2)
    with pytest.raises(TopologyError, match="gradient_accumulation_steps=1 contradicts .*set it to 2"):
        check_plan(config("train.gradient_accumulation_steps=1"), 2)
    assert check_plan(config("train.gradient_accumulation_steps=2"), 2).gradient_accumulation_steps == 2
    assert suggest_world_sizes(config()) == [1, 2, 4]
    assert suggest_world_sizes(config("train.gradient_accumulation_steps=2")) == [2]
    assert suggest_world_sizes(config("train.global_batch_size=18")) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_expert_parallelism_is_a_plan_at_every_stage(stage: int) -> None:
    check_plan(config("parallel.ep_size=2", f"parallel.zero_stage={stage}"), 4)
    assert suggest_world_sizes(config("parallel.ep_size=2")) == [2, 4]


def test_a_ratio_of_a_factor_that_the_method_lacks_is_refused() -> None:
    check_plan(config("adapter.method=lora", "train.lr_ratios.B=16", "train.lr_ratios.A=2"), 1)
    check_plan(config("adapter.method=lora", "train.lr_ratios.P=1"), 1)
    with pytest.raises(ConfigError, match=r"train.lr_ratios.P=2 has no meaning for adapter.method=molora.*\.P: 1"):
        check_plan(config("adapter.method=molora", "train.lr_ratios.P=2"), 1)
    with pytest.raises(ConfigError, match=r"train.lr_ratios.router=0.5 has no meaning for adapter.method=dora"):
        check_plan(config("adapter.method=dora", "train.lr_ratios.router=0.5"), 1)


def test_one_task_has_no_conflict() -> None:
    check_plan(config("adapter.task_conflict=project"), 1)
    alone = config_from_dict(
        recipe(data={"tasks": [{"name": "t", "train": "t.jsonl"}]}), ["--adapter.task_conflict=project"]
    )
    with pytest.raises(ConfigError, match="adapter.task_conflict=project has no meaning for one task, t. Nearest"):
        check_plan(alone, 1)


def test_expert_parallelism_is_refused_with_every_reason() -> None:
    with pytest.raises(TopologyError) as error:
        check_plan(config("parallel.ep_size=3"), 4)
    text = str(error.value)
    assert "parallel.ep_size=3 must divide adapter.num_experts=8; the nearest that does is 2" in text
    assert "parallel.ep_size=3 must divide the number of processes=4" in text
    with pytest.raises(ConfigError, match="method=lora, which has one expert"):
        check_plan(config("parallel.ep_size=2", "adapter.method=lora"), 2)
    with pytest.raises(ConfigError, match="adapter.method=dora, which has one expert. Nearest legal plan"):
        check_plan(config("parallel.ep_size=2", "adapter.method=dora"), 2)
    with pytest.raises(ConfigError, match="adapter.method=hydralora, whose tokens use every expert"):
        check_plan(config("parallel.ep_size=2", "adapter.method=hydralora"), 2)


@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
def test_settings_that_would_mix_experts_are_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {key: False}}))
    file = f"parallel.ds_config={path}"
    with pytest.raises(ConfigError, match=f"zero_optimization.{key}=False is refused with parallel.ep_size=2"):
        check_plan(config("parallel.ep_size=2", "parallel.zero_stage=1", file), 2)
    check_plan(config("parallel.ep_size=1", "parallel.zero_stage=1", file), 2)
    check_plan(config("parallel.ep_size=2", "parallel.zero_stage=3", file), 2)


def test_all_refusals_together(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    with pytest.raises(TopologyError) as error:
        check_plan(config("parallel.ds_config=" + str(path)), 3)
    assert len(str(error.value).splitlines()) == 3
