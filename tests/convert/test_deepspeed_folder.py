"""DeepSpeed's own checkpoints of PEFT runs on two processes become adapters, and nothing in them is run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from malora_dist.adapters.io.folder import CONFIG, open_adapter
from malora_dist.errors import CheckpointError, ConfigError
from tests.convert.made import run_kind
from tests.multiprocess import run_distributed

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1, "bf16": True},
    "zero2": {"stage": 2, "peft": {"use_dora": True, "use_rslora": True}},
    "zero3": {"stage": 3},
    "zero3-bf16": {"stage": 3, "bf16": True},
    "more": {"stage": 2, "peft": {"modules_to_save": ["lm_head"]}},
}
PART = "zero_pp_rank_{}_mp_rank_00_{}_states.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_distributed("tests.convert.deepspeed_workers:save_all", 2, folder=str(folder), cases=CASES)
    return folder


@pytest.mark.parametrize("case", [name for name in CASES if name != "more"])
@pytest.mark.parametrize("source", ["", "global_step2"])
def test_the_adapter_is_what_was_trained(saved: Path, tmp_path: Path, case: str, source: str) -> None:
    said = run_kind("from-deepspeed", saved / case / source, tmp_path / "ours", verify=True)
    assert said[0].startswith("verified: ")
    ours = open_adapter(tmp_path / "ours")
    wanted = load_file(saved / f"{case}.safetensors")
    peft = CASES[case].get("peft", {})
    assert (ours.info.spec.method, ours.info.spec.use_rslora) == (
        "dora" if peft.get("use_dora") else "lora",
        bool(peft.get("use_rslora")),
    )
    assert (ours.info.spec.r, ours.info.spec.lora_alpha, ours.info.lora_dropout) == (3, 5.0, 0.1)
    assert (ours.info.base_model, set(ours.info.target_modules)) == ("some/base", {"q_proj", "down_proj"})
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    names["magnitude"] = "lora_magnitude_vector.default.weight"
    assert len(ours.shapes) == len(wanted)
    for name in ours.shapes:
        layer, _, factor = name.rpartition(".")
        theirs = wanted[f"base_model.model.{layer}.{names[factor]}"]
        found = ours.read(name).view(theirs.shape)
        # Stage 3 stores its fp32 masters, of which bf16 weights are the rounded copy.
        assert torch.equal(found.to(theirs.dtype), theirs), name
        assert found.any() and (theirs.dtype == torch.bfloat16) == ("bf16" in case or case == "zero1")


def test_numbers_from_the_command_line(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "zero0" / "global_step2", tmp_path / "global_step2")
    with pytest.raises(ConfigError, match="DeepSpeed does not store lora_alpha"):
        run_kind("from-deepspeed", tmp_path / "global_step2", tmp_path / "ours")
    with pytest.raises(ConfigError, match="give it with --base"):
        run_kind("from-deepspeed", tmp_path / "global_step2", tmp_path / "ours", lora_alpha=5.0)
    run_kind("from-deepspeed", tmp_path / "global_step2", tmp_path / "ours", lora_alpha=5.0, base="b")
    info = open_adapter(tmp_path / "ours").info
    assert (info.spec.r, info.spec.scaling, info.base_model, len(info.target_modules)) == (3, 5 / 3, "b", 4)
    with pytest.raises(ConfigError, match="--lora-alpha is that of"):
        run_kind("from-deepspeed", saved / "zero0", tmp_path / "again", lora_alpha=5.0)


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("trap-was-run"),)


def trap(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def trap_as_torch(path: Path) -> None:
    torch.save({"module": Trap()}, path)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit_file(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return edit_file


def lose_a_tensor(state: dict[str, Any]) -> None:
    del state["module"]["base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"]


def second_adapter(state: dict[str, Any]) -> None:
    state["module"]["base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight"] = torch.ones(3, 48)


MODEL = "mp_rank_00_model_states.pt"
DAMAGES: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "pickle": ("zero0", MODEL, trap, "cannot be read as plain tensors, without running code"),
    "trap in a tensor file": ("zero0", MODEL, trap_as_torch, "cannot be read as plain tensors, without running code"),
    "optimizer trap": ("zero3", PART.format(1, "optim"), trap_as_torch, "without running code"),
    "cut": ("zero0", MODEL, lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be read"),
    "missing part": ("zero3", PART.format(1, "optim"), Path.unlink, "is missing"),
    "expert shards": ("zero0", "layer_0_expert_2_mp_rank_00_model_states.pt", Path.touch, "one rank's experts"),
    "tensor parallel": ("zero0", "mp_rank_01_model_states.pt", Path.touch, "tensor or pipeline parallelism"),
    "missing tensor": ("zero0", MODEL, edit(lose_a_tensor), "down_proj.B is missing"),
    "two adapters": ("zero0", MODEL, edit(second_adapter), "holds the adapters default, other"),
    "no LoRA": ("zero0", MODEL, edit(lambda state: state["module"].clear()), "holds no tensor of a PEFT LoRA"),
    "another dictionary": ("zero0", MODEL, lambda path: torch.save({"a": 1}, path), "not what DeepSpeed writes"),
    "no dictionary": ("zero0", MODEL, lambda path: torch.save([1], path), "it holds a list"),
    "not DeepSpeed": ("zero0", MODEL, Path.unlink, "is not a DeepSpeed checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_read_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    case, file, hurt, words = DAMAGES[name]
    shutil.copytree(saved / case, tmp_path / "source")
    hurt(tmp_path / "source" / "global_step2" / file)
    with pytest.raises(CheckpointError) as caught:
        run_kind("from-deepspeed", tmp_path / "source", tmp_path / "ours")
    assert words in str(caught.value), caught.value
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_is_more_than_a_lora_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lm_head.modules_to_save.default.weight was trained too"):
        run_kind("from-deepspeed", saved / "more", tmp_path / "ours")


def test_latest_cannot_lead_elsewhere(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "zero0", tmp_path / "source")
    (tmp_path / "source" / "latest").write_text("../other")
    with pytest.raises(CheckpointError, match="which is not a folder next to it"):
        run_kind("from-deepspeed", tmp_path / "source", tmp_path / "ours")
    assert json.loads((tmp_path / "source" / CONFIG).read_text())["r"] == 3
