"""Folders of models that bring their own code."""

import json
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny_llama

CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_model(folder: Path, mark: Path) -> Path:
    """Write a Llama under a type of its own, whose code leaves `mark` when it runs."""
    save_tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIG_CODE.format(mark=str(mark)))
    (folder / "modeling_own.py").write_text(MODEL_CODE)
    return folder


def keep_code_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy there what it runs, for this test; what an earlier one has imported is forgotten."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
