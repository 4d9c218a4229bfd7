"""Every key of adapter_config.json that is read keeps a rule, and the numbers belong together."""

import json
from pathlib import Path
from typing import Any

import pytest

from malora_dist.adapters.io.info import CONFIG, AdapterInfo, adapter_config, read_adapter_info
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.errors import CheckpointError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"base_model_name_or_path": 5}, "base_model_name_or_path=5 must be a string"),
    ({"target_modules": "q_proj"}, "target_modules='q_proj' must be a list of names of modules"),
    ({"target_modules": []}, "target_modules=[] must be a list of names"),
    ({"target_modules": [3]}, "target_modules=[3] must be a list of names"),
    ({"lora_dropout": "0.1"}, "lora_dropout='0.1' must be a number of at least 0 and less than 1"),
    ({"lora_dropout": True}, "lora_dropout=True must be a number"),
    ({"r": 5}, "r=5 must be malora.r=3"),
    ({"use_rslora": True}, "use_rslora=True must be malora.use_rslora=False"),
    ({"malora": []}, "malora=[] must be an object"),
    ({"malora.r": 3.5}, "malora.r=3.5 must be an integer of at least 1"),
    ({"malora.r": True}, "malora.r=True must be an integer"),
    ({"malora.method": ["malora"]}, "malora.method=['malora'] must be one of lora"),
    ({"malora.num_experts": 0}, "malora.num_experts=0 must be an integer of at least 1"),
    ({"malora.top_k": 5}, "top_k=5 must be at most num_experts="),
    ({"malora.shared_r": 2}, "shared_r=2 must be at least r=3"),
    ({"malora.shared_r": None}, "malora.shared_r=None must be 4 for malora"),
    ({"malora.lora_alpha": 1e400}, "Infinity is not JSON"),
    ({"malora.lora_alpha": 0}, "malora.lora_alpha=0 must be a positive number"),
    ({"malora.beta": 10**400}, "must be a positive number"),
    ({"malora.normalize_gates": "no"}, "malora.normalize_gates='no' must be true or false"),
    ({"malora.scaling": "gate"}, "malora.scaling='gate' must be one of lora, rslora, gate_norm, gate_sum"),
    ({"malora.router_input": "y"}, "malora.router_input='y' must be one of x, h"),
    ({"malora.router_dtype": 3}, "malora.router_dtype=3 must be one of float32, input"),
    ({"malora.scaling": 3}, "malora.scaling=3 must be one of"),
    ({"malora.use_newlora": True}, "malora.use_newlora is not a key of this format"),
    ({"malora.format_version": "1"}, "malora.format_version='1' must be an integer"),
    ({"malora.weights_sha256": "f00d"}, "malora.weights_sha256='f00d' must be 64 lower-case hex digits"),
    ({"malora.r": None, "r": "x" * 999}, "malora.r=None must be an integer"),
]


def written(folder: Path, changes: dict[str, Any], method: str = "malora") -> Path:
    spec = mixture_spec(method, num_experts=4, r=3, use_rslora=False)
    info = AdapterInfo(spec=spec, target_modules=("q_proj",), base_model="b", lora_dropout=0.0)
    config: dict[str, Any] = adapter_config(info)
    for key, value in changes.items():
        place, _, name = key.rpartition(".")
        (config[place] if place else config)[name] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_value_is_refused_with_file_key_and_rule(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_adapter_info(written(tmp_path, changes))
    assert message in str(error.value) and str(tmp_path / CONFIG) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_another_method_are_refused(tmp_path: Path, method: str) -> None:
    assert read_adapter_info(written(tmp_path, {}, method)).spec.method == method
    other = "lora" if method != "lora" else "malora"
    if method != "dora":
        with pytest.raises(CheckpointError, match="must be"):
            read_adapter_info(written(tmp_path, {"malora.method": other}, method))


def test_a_key_twice_and_a_list_in_a_list_in_a_list_are_damage(tmp_path: Path) -> None:
    text = (written(tmp_path, {}) / CONFIG).read_text()
    for changed, message in (
        (text.replace('"r": 3', '"r": 3, "r": 4', 1), "the key 'r' is given twice"),
        (text[:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
        (text[:-1] + ', "x": ' + "[" * 99_999, "nested more than 100 deep"),
        ("[]", "is not a JSON object"),
    ):
        (tmp_path / CONFIG).write_text(changed)
        with pytest.raises(CheckpointError, match=message):
            read_adapter_info(tmp_path)
