"""MaloraConfig: PEFT's names and defaults, errors that name arguments, and the way to a file and back."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from malora_dist import MaloraConfig, __version__
from malora_dist.adapters.io.info import CONFIG, adapter_config, read_adapter_info
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.errors import CheckpointError, ConfigError

CONFIGS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    {"r": 12, "num_experts": 4, "top_k": 1, "shared_r": 20, "normalize_gates": True, "use_rslora": True},
    {"compression_ratio": 0.25, "lora_alpha": 5.5, "lora_dropout": 0.1, "beta": 2.0, "router_aux_loss_coef": 0.0},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj", r".*\.0\..*"], "fuse_projections": True, "seed": 7},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers", "computation": "grouped"},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"nobody_has_it": 4.5}},
    {"scaling": "gate_norm", "num_experts": 4},
    {"scaling": "gate_sum", "normalize_gates": True},
    {"scaling": "rslora"},
    {"router_input": "h", "router_dtype": "input"},
    {"method": "lora", "use_rslora": True},
    {"method": "lora", "rank_pattern": {"q_proj": 2}, "base_model_name_or_path": "some/base"},
]


@pytest.mark.parametrize("arguments", CONFIGS)
def test_it_comes_back_from_dict_and_file(tmp_path: Path, arguments: dict[str, Any]) -> None:
    config = MaloraConfig(**arguments)
    assert MaloraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new")
    assert MaloraConfig.from_pretrained(tmp_path / "new") == config
    if config.target_modules is not None:
        assert read_adapter_info(tmp_path / "new").spec == config.spec


def test_names_and_defaults_are_those_of_peft() -> None:
    from peft import LoraConfig

    theirs, ours = LoraConfig(), MaloraConfig()
    shared = {field.name for field in fields(LoraConfig)} & {field.name for field in fields(MaloraConfig)}
    assert shared >= {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"}
    assert shared >= {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
    for name in shared - {"task_type", "base_model_name_or_path"}:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern"])
@pytest.mark.parametrize(
    ("pattern", "why"), [("(", "missing )"), ("a{99999999999999999999}", "too large"), ("(" * 900 + ")" * 900, "deep")]
)
def test_no_regular_expressions(key: str, pattern: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .*is not a valid regular expression: .*{re.escape(why)}"):
        MaloraConfig(**{key: {pattern: 3} if key in ("rank_pattern", "alpha_pattern") else [pattern]})


def test_rslora_has_two_names() -> None:
    assert MaloraConfig(use_rslora=True) == MaloraConfig(scaling="rslora")
    assert (
        MaloraConfig(scaling="rslora").to_dict()["use_rslora"] and "scaling" not in MaloraConfig().to_dict()["malora"]
    )
    assert MaloraConfig(scaling="gate_sum").to_dict()["malora"]["scaling"] == "gate_sum"


def test_the_older_name_of_an_argument() -> None:
    assert MaloraConfig(fuse_siblings=True) == MaloraConfig(fuse_projections=True)
    assert not MaloraConfig().fuse_projections and "fuse_siblings" not in MaloraConfig(fuse_siblings=True).to_dict()


def test_the_file_of_common_numbers_is_what_it_was() -> None:
    """Whoever reads version 1 reads it; what is not said there is not written."""
    config = MaloraConfig(r=3, num_experts=4, lora_alpha=6.0, target_modules=["q_proj"])
    info = config.to_info(["q_proj"])
    assert info.settings == {} and info.spec == mixture_spec("malora", r=3, num_experts=4)
    assert list(adapter_config(info)["malora"]) == [
        "format_version", "method", "num_experts", "top_k", "r", "shared_r", "lora_alpha", "beta", "normalize_gates",
        "use_rslora",
    ]  # fmt: skip
    assert adapter_config(info)["malora"]["format_version"] == 1  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:Unexpected keyword")
def test_a_pattern_without_numbers_of_layers_is_no_file_that_peft_refuses(tmp_path: Path) -> None:
    from peft import LoraConfig

    MaloraConfig(method="lora", layers_pattern="layers", target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert not LoraConfig.from_pretrained(str(tmp_path)).layers_pattern
    MaloraConfig.from_pretrained(tmp_path)


def test_the_file_says_which_version_wrote_it(tmp_path: Path) -> None:
    """Files of versions that did not say so are read, and those of later ones."""
    config = MaloraConfig(r=3)
    written = config.to_dict()
    assert written["malora_dist_version"] == __version__
    assert MaloraConfig.from_dict(written | {"malora_dist_version": "99.0"}) == config
    del written["malora_dist_version"]
    assert MaloraConfig.from_dict(written) == config


def test_numbers_of_single_layers_are_a_newer_format() -> None:
    found = MaloraConfig(alpha_pattern={"q_proj": 3.0}, target_modules="q_proj").to_dict()
    assert found["malora"]["format_version"] == 2 and found["alpha_pattern"] == {"q_proj": 3.0}
    assert "alpha_pattern" not in found["malora"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r=0 must be an integer of at least 1"),
        ({"r": 2.5}, "r=2.5 must be an integer"),
        ({"method": "malor"}, "method='malor' must be one of lora, "),
        ({"top_k": 9}, "top_k=9 must be at most num_experts=8"),
        ({"shared_r": 4}, "shared_r=4 must be at least r=8"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be at least 0 and less than 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be positive"),
        ({"compression_ratio": 2}, "compression_ratio=2 must be above 0 and at most 1"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1 must be at least 0"),
        ({"scaling": "goat"}, "scaling='goat' must be one of lora, rslora, gate_norm, gate_sum"),
        ({"use_rslora": True, "scaling": "gate_sum"}, "use_rslora=True is scaling='rslora', and scaling='gate_sum' is"),
        ({"computation": "sparse"}, "computation='sparse' must be one of auto"),
        ({"target_modules": []}, "target_modules=() must be None or name at least one linear"),
        ({"target_modules": ["(q_proj"]}, "target_modules: '(q_proj' is not a valid regular expression"),
        ({"exclude_modules": [""]}, "exclude_modules=[''] must hold names"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=(-1,) must be numbers of layers"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "rank_pattern={'q_proj': 0} must give names of layers integers of at least 1",
        ),
        (
            {"alpha_pattern": {"q_proj": "x"}},
            "alpha_pattern={'q_proj': 'x'} must give names of layers positive numbers",
        ),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is not a valid regular expression"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' must be CAUSAL_LM or None"),
    ],
)
def test_errors_name_argument_value_and_rule(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        MaloraConfig(**arguments)
    assert "adapter." not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_aux_loss_coef": "much"}, "router_aux_loss_coef='much' must be a number of at least 0"),
        ({"layers_to_transform": [True]}, "layers_to_transform=[True] must be a list of numbers of layers"),
        ({"rank_pattern": [1]}, "rank_pattern=[1] must be an object"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern={'q_proj': -1} must give names of layers integers"),
        ({"peft_type": None, "malora": None}, "malora=None must be an object"),
    ],
)
def test_a_damaged_file_is_refused_with_key_and_rule(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = MaloraConfig(rank_pattern={"q_proj": 2}, target_modules="q_proj").to_dict() | changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        MaloraConfig.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG) in str(error.value)


def test_a_layer_of_another_rank_keeps_the_compression_ratio() -> None:
    spec = MaloraConfig(r=12, rank_pattern={"q_proj": 6, r"layers\.1\.mlp\..*": 24}, alpha_pattern={"v_proj": 3}).spec
    layers = {
        name: spec.of_layer(f"model.layers.1.{name}")
        for name in ("self_attn.q_proj", "mlp.up_proj", "self_attn.v_proj")
    }
    assert [(layer.r, layer.shared_r, layer.scaling) for layer in layers.values()] == [
        (6, 16, 8 / 6), (24, 64, 8 / 24), (12, 32, 3 / 12)
    ]  # fmt: skip
    assert not any(layer.has_patterns for layer in layers.values())


def test_no_folder_and_no_id_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and it is not an id of the Hugging Face Hub"):
        MaloraConfig.from_pretrained(tmp_path / "none")
