"""A new recipe names the linears of the model that it is for."""

from pathlib import Path

import pytest

from malora_dist.config import AdapterConfig, load_config
from malora_dist.training.target_families import family_targets
from tests.commands import malora
from tests.families import family_config
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", AdapterConfig().target_modules),
        ("gemma3", AdapterConfig().target_modules),
        ("phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
        ("gpt_neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
        ("mixtral", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_targets_of_a_family(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    (tiny_config() if family == "llama" else family_config(family)).save_pretrained(tmp_path)
    assert family_targets(str(tmp_path)) == targets


def test_init_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family_config("phi3").save_pretrained(tmp_path)
    recipe = tmp_path / "r.yaml"
    assert malora("init", str(recipe), "--model", str(tmp_path)) == 0
    assert load_config(recipe).adapter.target_modules == ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    assert "not on this machine" not in capsys.readouterr().out
    assert malora("init", str(tmp_path / "other.yaml"), "--model", "nobody/no-such-model") == 0
    assert "nobody/no-such-model is not on this machine" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_is_not_here_has_none(tmp_path: Path) -> None:
    assert family_targets(str(tmp_path)) is None and family_targets("nobody/no-such-model") is None
