import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from malora_dist.config import RunConfig, config_from_dict
from malora_dist.config.deepspeed import deepspeed_config
from malora_dist.config.deepspeed_keys import OFFLOAD_KEYS, REFUSED_ZERO_KEYS, ZERO_KEYS
from malora_dist.errors import ConfigError, TopologyError
from tests.config.recipes import recipe
from tests.multiprocess import ROOT


def config(folder: Path, given: Any, *overrides: str) -> RunConfig:
    path = folder / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return config_from_dict(recipe(parallel={"ds_config": str(path)}), overrides)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_alone_suffices(stage: int) -> None:
    result = deepspeed_config(config_from_dict(recipe(parallel={"zero_stage": stage})), 2)
    assert result["zero_optimization"] == {"stage": stage}
    assert result["train_batch_size"] == 16 and result["train_micro_batch_size_per_gpu"] == 4
    assert result["gradient_accumulation_steps"] == 2 and result["gradient_clipping"] == 1.0
    assert "bf16" not in result and "fp16" not in result and "optimizer" not in result
    assert result["steps_per_print"] > 10**6


def test_auto_is_filled_or_left_to_deepspeed(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    result = deepspeed_config(config(tmp_path, given), 2)
    assert result["train_batch_size"] == 16 and "bf16" not in result
    assert result["zero_optimization"] == {"stage": 3, "overlap_comm": True}


def test_offload_keeps_the_recipes_optimizer(tmp_path: Path) -> None:
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert deepspeed_config(config(tmp_path, given), 2)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ConfigError, match="parallel.zero_stage=0 .*offload_optimizer needs stage 1"):
        deepspeed_config(config(tmp_path, given, "parallel.zero_stage=0"), 2)


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"zero_optimization": {"stage": 2}}, ["parallel.zero_stage=3", "zero_optimization.stage=2"]),
        ({"train_batch_size": 8}, ["train.global_batch_size=16", "train_batch_size=8"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["per_device_train_batch_size=4", "per_gpu=8"]),
        ({"gradient_accumulation_steps": 4}, ["accumulation (derived)=2", "gradient_accumulation_steps=4"]),
        ({"gradient_clipping": 0.5}, ["train.max_grad_norm=1.0", "gradient_clipping=0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "engine runs in fp32", "model.dtype"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer=", "train.optim"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler=", "train.lr_scheduler_type"]),
        ({"expert_parallel": {"enabled": True}}, ["expert_parallel", "AutoEP"]),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size=2"]),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size=2", "hpZ"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["mics_shard_size=2", "MiCS"]),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, ["zero_quantized_gradients=True"]),
        ({"zero_optimization": {"zero_quantized_weights": True}}, ["zero_quantized_weights=True"]),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, ["nontrainable_weights=True"]),
        ({"zero_optimization": {"leaf_module": {"classes": ["M"]}}}, ["leaf_module"]),
        ({"zero_optimization": {"overlap_com": True}}, ["overlap_com", "did you mean overlap_comm?"]),
        ({"zero_optimisation": {}}, ["did you mean zero_optimization?"]),
        ({"zero_optimization": {"offload_param": {"devices": "cpu"}}}, ["offload_param.devices", "device?"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer.device=nvme", "could not be saved"],
        ),
        ({"zero_optimization": 3}, ["zero_optimization=3", "must be an object"]),
        ('{"bf16": {}, "bf16": {}}', ["'bf16' is given twice"]),
        ("[1]", ["must hold a JSON object"]),
        ("{", ["is not valid JSON"]),
    ],
)
def test_refusals_name_both_sides(tmp_path: Path, given: Any, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        deepspeed_config(config(tmp_path, given), 2)
    for fragment in [*fragments, "ds.json"]:
        assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) == 1, "one mistake, one error"


def test_harmless_values_pass(tmp_path: Path) -> None:
    given = {"optimizer": None, "fp16": {"enabled": False}, "zero_optimization": {"zero_hpz_partition_size": 1}}
    assert deepspeed_config(config(tmp_path, given), 2)["zero_optimization"]["stage"] == 3


def test_indivisible_batch_and_missing_file() -> None:
    with pytest.raises(TopologyError, match="cannot be split"):
        deepspeed_config(config_from_dict(recipe()), 3)
    with pytest.raises(ConfigError, match="none.json cannot be read"):
        deepspeed_config(config_from_dict(recipe(parallel={"ds_config": "none.json"})), 2)


@pytest.mark.parametrize(
    ("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)], ids=lambda value: str(value)
)
def test_shipped_files_are_accepted_and_decide_nothing(name: str, stage: int) -> None:
    path = ROOT / "ds_configs" / f"{name}.json"
    given = json.loads(path.read_text())
    assert all(value == "auto" for key, value in given.items() if key != "zero_optimization")
    result = deepspeed_config(config_from_dict(recipe(parallel={"ds_config": str(path), "zero_stage": stage})), 2)
    assert result["zero_optimization"]["stage"] == stage and "auto" not in json.dumps(result)


def test_deepspeed_reads_our_dict_as_meant() -> None:
    engine_config = import_module("deepspeed.runtime.config").DeepSpeedConfig
    path = str(ROOT / "ds_configs" / "zero3_offload.json")
    read = engine_config(deepspeed_config(config_from_dict(recipe(parallel={"ds_config": path})), 1))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (16, 4, 4)
    assert read.zero_config.stage == 3 and read.zero_config.offload_optimizer.device == "cpu"
    assert not read.bfloat16_config.enabled and not read.float16_config.enabled and read.gradient_clipping == 1.0


def test_our_keys_are_deepspeeds_keys() -> None:
    """Every ZeRO key of the installed DeepSpeed is either passed on or refused with a reason, and none is invented."""
    zero = import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    offload = import_module("deepspeed.runtime.zero.offload_config")
    known = set(zero.model_fields) | {field.alias for field in zero.model_fields.values() if field.alias}
    mics = {"mics_shard_size", "mics_hierarchical_params_gather"}
    assert known == (ZERO_KEYS | set(REFUSED_ZERO_KEYS)) - mics
    assert OFFLOAD_KEYS["offload_param"] == set(offload.DeepSpeedZeroOffloadParamConfig.model_fields)
    assert OFFLOAD_KEYS["offload_optimizer"] <= set(offload.DeepSpeedZeroOffloadOptimizerConfig.model_fields)
