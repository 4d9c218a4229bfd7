"""`malora convert` as a user meets it: what is refused, and what a stopped conversion leaves."""

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from malora_dist.adapters.adapted_layers import adapter_state_dict
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io.folder import open_adapter, save_adapter
from malora_dist.adapters.io.from_model import save_model_adapter
from malora_dist.adapters.methods import mixture_spec
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.cli.app import main
from malora_dist.cli.inspect.detect import inspect
from malora_dist.errors import CheckpointError, ConfigError
from tests.adapter_samples import edit_weights
from tests.config.recipes import recipe
from tests.convert.made import job_of, make_checkpoint, run_kind
from tests.families import family_model
from tests.models.own_code import keep_code_in, own_model
from tests.processes import start, wait
from tests.tiny_models import tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Adapter = Callable[[Path], object]


def command(*arguments: str | Path) -> int:
    """The exit code of `malora convert ...` in this process."""
    try:
        main(["convert", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = workspace / "runs" / "malora", tmp_path / "out"
    assert command(source, target, "--to", "molora", "--verify") == 0
    out = capsys.readouterr().out
    assert "verified max |d logits|" in out and f"wrote {target}" in out
    assert command(source, target, "--to", "molora") == 2
    assert f"{target} exists: nothing is overwritten" in capsys.readouterr().err
    assert command("--help") == 0
    assert "peft-tasks" in capsys.readouterr().out


WRONG: dict[str, tuple[list[str], str]] = {
    "kind": (["SRC", "DST", "--to", "peft-task"], "--to peft-task: unknown kind; did you mean peft-tasks?"),
    "no kind like it": (["SRC", "DST", "--to", "gguf"], "--to gguf: unknown kind. Kinds are adapter, checkpoint,"),
    "option": (["SRC", "DST", "--to", "adapter", "--shards", "3"], "--shards has no effect with --to adapter;"),
    "text alone": (["SRC", "DST", "--to", "molora", "--text", "x"], "give --verify too"),
    "no target": (["SRC", "--to", "adapter"], "DST, a folder to write, is missing"),
    "two sources": (["SRC", "SRC", "DST", "--to", "adapter"], "--to adapter takes one SRC, then DST; 2 SRC were given"),
    "no source": (["DST/none", "DST", "--to", "adapter"], "none: there is no such file or folder"),
    "not an adapter": (["SRC/..", "DST", "--to", "adapter"], "is not an adapter folder"),
    "method": (["SRC/../lora", "DST", "--to", "molora"], "--to molora takes hydralora, malora;"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    places = {"SRC": str(workspace / "runs" / "malora"), "DST": str(tmp_path / "out")}
    arguments, said = WRONG[wrong]
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert command(*arguments) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def edited_config(**changes: Any) -> Adapter:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "malora": {**config["malora"], **changes}}))

    return edit


def without(ending: str) -> Adapter:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[next(key for key in tensors if key.endswith(ending))]
        save_file(tensors, folder / WEIGHTS)

    return edit


def not_finite(folder: Path) -> None:
    edit_weights(folder, lambda tensors: next(iter(tensors.values())).view(-1)[3].fill_(float("nan")))


def swapped(folder: Path) -> None:
    """Two tensors of one shape with each other's name."""
    tensors = load_file(folder / WEIGHTS)
    first, second = [key for key in tensors if key.endswith("q_proj.P")][:2]
    save_file(tensors | {first: tensors[second], second: tensors[first]}, folder / WEIGHTS)


def linked_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def pickled(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder.parent / "sprung"),)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))


DAMAGES: dict[str, tuple[Adapter, str]] = {
    "pickle": (pickled, "adapter_model.bin is a pickle, which can run arbitrary code"),
    "link": (linked_out, "outside its folder"),
    "missing tensor": (without("q_proj.P"), r"lacks model.layers.\d.self_attn.q_proj.P \(1 missing, 0 unknown\)"),
    "newer": (edited_config(format_version=99), "format_version 99 is newer"),
    "other numbers": (edited_config(shared_r=5, num_experts=4), "needs \\(5, "),
    "swapped names": (swapped, "not the file that adapter_config.json belongs to: its SHA-256 is"),
    "not finite": (not_finite, "holds numbers that are not finite"),
    "a folder of weights": (lambda folder: (folder / CONFIG).unlink(), "is not an adapter folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources(workspace: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(workspace / "runs" / "malora" / "adapter", tmp_path / "source")
    hurt, said = DAMAGES[damage]
    hurt(tmp_path / "source")
    with pytest.raises(CheckpointError, match=said):
        run_kind("molora", tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("family", "wanted", "attention"),
    [("bloom", None, "eager"), ("llama", None, "sdpa"), ("llama", "eager", "eager"), ("llama", "varlen", "sdpa")],
)
def test_the_attention_is_the_recipes_or_what_the_family_has(
    tmp_path: Path, family: str, wanted: str | None, attention: str
) -> None:
    family_model(family).save_pretrained(tmp_path / "model")
    job = job_of("merged", tmp_path, tmp_path)
    if wanted is not None:
        recipe_file = tmp_path / "config.yaml"
        model = {"name_or_path": str(tmp_path / "model"), "attn_implementation": wanted}
        recipe_file.write_text(yaml.safe_dump(recipe(model=model)))
    assert job.load_model(tmp_path / "model").config._attn_implementation == attention


def test_another_base_is_refused(workspace: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(workspace / "model", tmp_path / "base")
    config = LlamaConfig.from_pretrained(tmp_path / "base", num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"has model.layers.1.*, which this base does not have \(0 missing, 12 unknown\)"
    ):
        run_kind("molora", workspace / "runs" / "malora", tmp_path / "out", verify=True, base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_brings_its_recipe_and_knows_its_base(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "runs" / "malora", tmp_path / "run")
    checkpoint = make_checkpoint(tmp_path / "run")
    shutil.copytree(workspace / "model", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the base of .*step-000007: its fingerprint"):
        run_kind("peft-tasks", checkpoint, tmp_path / "out", base=str(tmp_path / "other"))
    said = run_kind("peft-tasks", checkpoint, tmp_path / "out", eval_samples=5, calibration=3)
    assert [line.split()[:2] for line in said[1:4]] == [["colour", "5"], ["animal", "5"], ["spell", "5"]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"colour", "animal", "spell"}


def test_latest_and_best_stand_for_the_checkpoints_they_name(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "runs" / "malora", tmp_path / "run")
    checkpoint = make_checkpoint(tmp_path / "run")
    pointer = checkpoint.with_name("latest")
    assert Checkpoint.open(pointer).folder == open_adapter(pointer).path == checkpoint
    assert inspect(pointer) == inspect(checkpoint)
    run_kind("checkpoint", pointer, tmp_path / "step-000007", shards=2)
    run_kind("adapter", pointer, tmp_path / "adapter")
    for content in ("step-000008", "../run", "step-7", ""):
        pointer.write_text(content)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            Checkpoint.open(pointer)


def test_code_of_a_base_runs_only_at_the_users_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, a checkpoint or an adapter may be somebody else's, whatever its recipe or its config says."""
    keep_code_in(tmp_path / "modules", monkeypatch)
    base, run, mark = own_model(tmp_path / "base", tmp_path / "mark"), tmp_path / "run", tmp_path / "mark"
    model = tiny_llama()
    inject_adapters(model, mixture_spec("lora", r=2), ["q_proj"])
    info = save_model_adapter(model, run / "adapter")
    config = {"model": {"name_or_path": str(base), "trust_remote_code": True}, "adapter": {"method": "lora", "r": 2}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe(**config)))
    with pytest.raises(ConfigError, match="of your permissions, so the setting in SRC is not used") as caught:
        run_kind("merged", run, tmp_path / "out")
    assert f"--recipe {run / 'config.yaml'}" in str(caught.value) and "modeling_own.OwnForCausalLM" in str(caught.value)
    alone = replace(info, trust_remote_code=True, base_model=str(base))
    save_adapter(tmp_path / "alone", alone, adapter_state_dict(model), "card")
    with pytest.raises(ConfigError, match=r"with which .*/alone was made.* --recipe RECIPE.yaml"):
        run_kind("merged", tmp_path / "alone", tmp_path / "out")
    assert inspect(tmp_path / "alone")["trust_remote_code"] is True
    assert not mark.exists() and not (tmp_path / "out").exists()
    said = run_kind("merged", run, tmp_path / "out", recipe=run / "config.yaml")
    assert said[0].startswith("note: model.trust_remote_code=true: code of") and mark.exists()
    assert (tmp_path / "out" / "modeling_own.py").is_file()


def convert_under_a_limit(source: Path, target: Path) -> int:
    """Convert where the kernel kills who writes 8 KiB into a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, 2**13))
    return command(source, target, "--to", "peft-experts")


@pytest.mark.distributed
def test_killed_while_writing(workspace: Path, tmp_path: Path) -> None:
    """The kernel kills the writer inside the first expert's file; the next conversion starts afresh."""
    source, target, log = workspace / "runs" / "malora", tmp_path / "new" / "out", tmp_path / "log"
    target.parent.mkdir()
    writer = start("tests.convert.test_job:convert_under_a_limit", [source, target], log)
    assert wait([writer]) == [-signal.SIGXFSZ], log.read_text()
    assert {path.name for path in target.parent.iterdir()} == {".out.partial", ".out.partial.lock"}
    run_kind("peft-experts", source, target)
    assert {path.name for path in target.parent.iterdir()} == {"out"}
    assert len(list(target.rglob("*.safetensors"))) == 4
