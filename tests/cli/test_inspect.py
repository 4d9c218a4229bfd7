"""`malora inspect`: what a path is, what is in it, and what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from malora_dist.adapters.io.folder import WEIGHTS, open_adapter
from malora_dist.cli.app import app
from malora_dist.cli.inspect.detect import inspect
from malora_dist.cli.inspect.lines import lines
from malora_dist.errors import CheckpointError, MaloraError
from malora_dist.tracking.metrics import MetricsWriter
from tests.adapter_samples import edit_weights
from tests.convert.made import make_checkpoint, make_workspace, run_kind

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a checkpoint each, and what conversions make of them."""
    folder = make_workspace(tmp_path_factory.mktemp("inspect"))
    for method in ("malora", "lora"):
        make_checkpoint(folder / "runs" / method)
    run_kind("peft", folder / "runs" / "dora", folder / "peft")
    run_kind("merged", folder / "runs" / "lora" / "adapter", folder / "merged")
    run_kind("peft-experts", folder / "runs" / "molora", folder / "experts")
    (folder / "ds" / "global_step5").mkdir(parents=True)
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "layer_0_expert_3_mp_rank_00_model_states.pt"):
        (folder / "ds" / "global_step5" / name).write_bytes(b"never opened")
    (folder / "tiny.gguf").write_bytes(b"GGUF....")
    return folder


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "runs/malora": ("run", {"method": "malora", "num_experts": 4, "r": 4, "shared_r": 6, "checkpoints": [7]}),
    "runs/malora/checkpoints": ("folder of checkpoints", {"checkpoints": [7], "latest": "step-000007", "best": None}),
    "runs/malora/checkpoints/step-000007": ("checkpoint", {"step": 7, "method": "malora"}),
    "runs/hydralora/adapter": ("adapter", {"method": "hydralora", "top_k": 4, "scaling": 3.0, "router_input": "h"}),
    "peft": ("adapter of PEFT", {"method": "dora"}),
    "merged": ("model with a merged adapter", {"model_type": "llama", "dtypes": ["float32"]}),
    "model": ("model", {"model_type": "llama"}),
    "experts": ("folder of 4 adapters", {}),
    "ds": ("checkpoint of DeepSpeed", {"tags": ["global_step5"], "files": 2, "expert_files": 1, "zero_stage_3": True}),
    "tiny.gguf": ("GGUF model", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_says_what_it_is(made: Path, name: str) -> None:
    kind, wanted = KINDS[name]
    facts = inspect(made / name)
    assert (facts["kind"], facts["damaged"]) == (kind, [])
    assert facts | wanted == facts
    assert json.loads(json.dumps(facts)) == facts and all(isinstance(line, str) for line in lines(facts))
    assert next(lines(facts)) == f"{made / name}: {kind}"


@pytest.mark.parametrize("method", ["malora", "molora", "hydralora", "lora", "dora"])
def test_counts_and_norms(made: Path, method: str) -> None:
    adapter = open_adapter(made / "runs" / method / "adapter")
    facts = inspect(made / "runs" / method / "adapter")
    tensors = [adapter.read(name) for name in adapter.shapes]
    assert (facts["tensors"], facts["parameters"]) == (len(tensors), sum(tensor.numel() for tensor in tensors))
    factors = adapter.read_layer(LAYER)
    A = factors["P"] @ factors["shared_A"] if "P" in factors else factors.get("A", factors.get("shared_A"))
    wanted = adapter.info.spec.scaling * (factors["B"] @ A).norm(dim=(1, 2))
    assert facts["layers"][LAYER]["norms"] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert not facts["layers"][LAYER]["dead"] and not facts["layers"][LAYER]["duplicates"]


def test_dead_and_duplicate_experts(made: Path, tmp_path: Path) -> None:
    """Expert 1 has norm 0; 3 is 0 with its basis turned, its size doubled and a little noise; 2 gets no token."""
    run = tmp_path / "run"
    shutil.copytree(made / "runs" / "malora", run)
    shutil.rmtree(run / "checkpoints")

    def change(tensors: dict[str, Tensor]) -> None:
        P, B = tensors[f"base_model.model.{LAYER}.P"], tensors[f"base_model.model.{LAYER}.B"]
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
        B[1] = 0
        P[3], B[3] = turn @ P[0], 2 * B[0] @ turn.T
        B[3] += 0.1 * B[3].abs().mean()

    edit_weights(run / "adapter", change)
    with MetricsWriter(run / "metrics.jsonl") as writer:
        for step, share in ((5, [0.25] * 4), (10, [0.5, 0.25, 0.01, 0.24])):
            share_of = {"a": {LAYER: share}, "b": {LAYER: share}}
            writer.write({"kind": "routing", "step": step, "tasks": ["a", "b"], "share": share_of})
    for path in (run, run / "adapter"):
        layer = inspect(path)["layers"][LAYER]
        assert layer["dead"] == [1, 2] and layer["shares"] == [0.5, 0.25, 0.01, 0.24]
        ((t, u, cosine),) = layer["duplicates"]
        assert (t, u) == (0, 3) and 0.99 < cosine < 1
    text = "\n".join(lines(inspect(run)))
    assert f"{LAYER}: 1, 2" in text and f"{LAYER}: 0 and 3, cosine 0.99" in text
    early = make_checkpoint(run, step=6)
    assert inspect(early)["layers"][LAYER]["dead"] == [1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "routing", "share": {}}) + "\n")
    with pytest.raises(MaloraError, match="metrics.jsonl is damaged: a routing record is not readable: KeyError"):
        inspect(early)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def not_finite(path: Path) -> None:
    edit_weights(path.parent, lambda tensors: tensors[f"base_model.model.{LAYER}.B"].view(-1)[:1].fill_(torch.nan))


STEP = "runs/malora/checkpoints/step-000007"
DAMAGES: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "flipped byte": (STEP, "optimizer-00001-of-00001.safetensors", flip, "its SHA-256 is"),
    "cut checkpoint": (STEP, "adapter-00001-of-00001.safetensors", cut, "bytes, the manifest says"),
    "no manifest": (STEP, "manifest.json", Path.unlink, "manifest.json"),
    "run": ("runs/malora", "adapter/adapter_model.safetensors", cut, "is damaged: the file ends"),
    "changed adapter": ("runs/malora/adapter", WEIGHTS, flip, "malora.weights_sha256 says"),
    "adapter": ("runs/malora/adapter", WEIGHTS, not_finite, f"{LAYER}.B holds numbers that are not finite"),
    "model": ("model", "model.safetensors", cut, "is missing or damaged"),
    "config": ("model", "config.json", cut, "cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_and_sets_the_exit_code(made: Path, tmp_path: Path, case: str) -> None:
    name, file, hurt, words = DAMAGES[case]
    path = tmp_path / Path(name).name
    shutil.copytree(made / name, path)
    hurt(path / file)
    done = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert done.exit_code == 1, done.output
    (message,) = json.loads(done.stdout)["damaged"]
    assert words in message and file.rpartition("/")[2] in message


def test_damage_does_not_hide_the_rest(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs" / "malora" / "adapter", tmp_path / "adapter")
    not_finite(tmp_path / "adapter" / WEIGHTS)
    facts = inspect(tmp_path / "adapter")
    assert len(facts["layers"]) == 5 and LAYER not in facts["layers"]
    shutil.copytree(made / STEP, tmp_path / "step-000007")
    flip(tmp_path / "step-000007" / "rng.safetensors")
    assert inspect(tmp_path / "step-000007")["topology"] == {"world_size": 2, "ep_size": 2, "zero_stage": 3}


def test_peft_that_ours_cannot_be_is_no_damage(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    facts = inspect(tmp_path / "peft")
    assert not facts["damaged"] and 'bias="all"' in facts["not_read"]


def test_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    (tmp_path / ".step-000001.partial").mkdir()
    with pytest.raises(CheckpointError, match="is a pickle, which is never unpickled"):
        inspect(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="of no known kind: it holds pickles"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        inspect(tmp_path / "x")
    assert inspect(tmp_path / ".step-000001.partial")["kind"] == "unfinished"


def test_the_command_prints_text(made: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(made / "runs" / "malora")])
    assert done.exit_code == 0, done.output
    assert "malora: run" in done.output and LAYER in done.output and "dead experts" in done.output
