"""lora, dora and rank-stabilised adapters to PEFT and back: the same bits, the same logits, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from malora_dist import MaloraConfig, get_malora_model
from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.io.folder import CONFIG, WEIGHTS, open_adapter
from malora_dist.adapters.io.peft import open_peft
from malora_dist.adapters.loading import load_adapter
from malora_dist.convert.job import convert
from malora_dist.convert.kinds import ConvertOptions
from malora_dist.errors import CheckpointError, ConfigError
from tests.convert.made import base, logits, make_checkpoint, run_kind, token_rows
from tests.families import family_model

SWITCHES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}


def stock(folder: Path, target: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A PEFT adapter with random numbers, saved by PEFT."""
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]} | config
    model = get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data = (parameter + 0.1 * noise).to(dtype)
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(target)
    return model.eval()


@pytest.mark.parametrize("kind", SWITCHES)
def test_there_and_back_again(workspace: Path, tmp_path: Path, kind: str) -> None:
    """PEFT's own files, through ours, to PEFT: bits and logits."""
    theirs = stock(workspace, tmp_path / "stock", **SWITCHES[kind])
    run_kind("from-peft", tmp_path / "stock", tmp_path / "ours")
    run_kind("peft", tmp_path / "ours", tmp_path / "again")
    before, after = load_file(tmp_path / "stock" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())

    rows = token_rows()
    wanted = logits(theirs, rows)
    ours = base(workspace)
    info = load_adapter(ours, tmp_path / "ours")
    assert (info.spec.method, info.spec.use_rslora) == (kind.split("-")[0].replace("rs", ""), "rslora" in kind)
    torch.testing.assert_close(logits(ours, rows), wanted, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(base(workspace), rows), wanted, atol=1e-2)
    again = PeftModel.from_pretrained(base(workspace), tmp_path / "again")
    assert torch.equal(logits(again, rows), wanted)
    config = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert "malora" not in config and config["lora_alpha"] == 5 and config["lora_dropout"] == 0.1


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trained_here_verified_in_peft(workspace: Path, tmp_path: Path, method: str) -> None:
    said = run_kind("peft", workspace / "runs" / method, tmp_path / "peft", verify=True)
    assert any(line.startswith("verified peft: max |d logits|") for line in said), said
    text = tmp_path / "text.txt"
    text.write_text("A frog and a princess walked to the river. " * 9)
    said = run_kind("from-peft", tmp_path / "peft", tmp_path / "back", verify=True, text=text)
    assert any(line.startswith("verified") for line in said), said
    ours, back = open_adapter(workspace / "runs" / method), open_adapter(tmp_path / "back")
    assert ours.info.spec == back.info.spec and ours.shapes == back.shapes
    assert all(torch.equal(ours.read(name), back.read(name)) for name in ours.shapes)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_of_the_library_comes_and_goes(workspace: Path, tmp_path: Path, method: str) -> None:
    """With every argument off its default; what PEFT gets has keys of PEFT alone."""
    config = MaloraConfig(
        method=method, r=3, num_experts=3, top_k=1, shared_r=9, compression_ratio=0.25, lora_alpha=5, lora_dropout=0.1,
        use_rslora=True, beta=2.0, normalize_gates=True, router_aux_loss_coef=0.5, target_modules=["q_proj", "up_proj"],
        exclude_modules=["0.mlp.up_proj"], layers_to_transform=[0, 1], layers_pattern="layers",
        rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 7}, router_input="h", router_dtype="input",
        computation="dense", fuse_projections=True, seed=7,
        base_model_name_or_path="a/base", task_type=None,
    )  # fmt: skip
    assert not any(getattr(config, field.name) == field.default for field in fields(config))
    model: Any = get_malora_model(base(workspace), config)
    for number, (_, layer) in enumerate(mixture_layers(model)):
        torch.nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(tmp_path / "ours")
    run_kind("peft", tmp_path / "ours", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / CONFIG).read_text()).keys() <= {field.name for field in fields(LoraConfig)}
    theirs = PeftModel.from_pretrained(base(workspace), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs, token_rows()), logits(model.eval(), token_rows()), atol=2e-5, rtol=1e-5)
    run_kind("from-peft", tmp_path / "peft", tmp_path / "back", base="a/base")
    ours, back = open_adapter(tmp_path / "ours"), open_adapter(tmp_path / "back")
    assert replace(ours.info.spec, beta=1.0, normalize_gates=False) == back.info.spec
    assert sorted(ours.info.target_modules) == sorted(back.info.target_modules)
    assert ours.shapes == back.shapes and all(torch.equal(ours.read(name), back.read(name)) for name in ours.shapes)


def test_half_precision_widens(workspace: Path, tmp_path: Path) -> None:
    stock(workspace, tmp_path / "stock", torch.bfloat16)
    run_kind("from-peft", tmp_path / "stock", tmp_path / "ours")
    ours, theirs = open_adapter(tmp_path / "ours"), open_peft(tmp_path / "stock")
    for name in theirs.shapes:
        assert ours.read(name).dtype == torch.float32 and theirs.read(name).dtype == torch.bfloat16
        assert torch.equal(ours.read(name), theirs.read(name).float())


def test_equal_patterns_and_found_targets_are_read(workspace: Path, tmp_path: Path) -> None:
    everywhere = {"rank_pattern": {"q_proj": 6, "down_proj": 6}, "alpha_pattern": {"layers.0.self_attn.q_proj": 8}}
    stock(workspace, tmp_path / "stock", target_modules=r".*\.0\..*q_proj", **everywhere)
    source = open_peft(tmp_path / "stock")
    assert (source.info.spec.r, source.info.spec.lora_alpha) == (6, 8.0)
    assert source.info.target_modules == ("model.layers.0.self_attn.q_proj",)


def test_layers_may_have_numbers_of_their_own(workspace: Path, tmp_path: Path) -> None:
    """Those of patterns, which stay what they are; a pattern's value that no layer has does not matter."""
    patterns = {"rank_pattern": {"q_proj": 6, "nobody": None}, "alpha_pattern": {r"layers\.1\..*": 7}}
    theirs, ours = stock(workspace, tmp_path / "stock", **patterns), base(workspace)
    run_kind("from-peft", tmp_path / "stock", tmp_path / "ours")
    load_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(ours, token_rows()), logits(theirs, token_rows()), atol=2e-5, rtol=1e-5)
    spec = open_adapter(tmp_path / "ours").info.spec
    assert spec.rank_pattern == (("q_proj", 6),) and spec.alpha_pattern == ((r"layers\.1\..*", 7.0),)
    run_kind("peft", tmp_path / "ours", tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "stock" / WEIGHTS).keys()
    assert open_peft(tmp_path / "again").info.spec == spec
    with pytest.raises(CheckpointError, match="rank_pattern or alpha_pattern gives its layers numbers of their own"):
        convert("malora", (tmp_path / "ours", tmp_path / "ours"), tmp_path / "mixture", ConvertOptions())


@pytest.mark.parametrize(
    ("narrowing", "layers"),
    [
        ({"layers_to_transform": 1}, {"1.self_attn.q_proj", "1.mlp.down_proj"}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"0.self_attn.q_proj", "0.mlp.down_proj"}),
        ({"exclude_modules": ["0.mlp.down_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"}),
        ({"exclude_modules": r".*\.q_proj"}, {"0.mlp.down_proj", "1.mlp.down_proj"}),
    ],
)
def test_narrowed_targets(workspace: Path, tmp_path: Path, narrowing: dict[str, Any], layers: set[str]) -> None:
    """There and back again; the layers are those that have weights in the file."""
    theirs, ours = stock(workspace, tmp_path / "stock", **narrowing), base(workspace)
    run_kind("from-peft", tmp_path / "stock", tmp_path / "ours")
    assert set(load_adapter(ours, tmp_path / "ours").target_modules) == {f"model.layers.{layer}" for layer in layers}
    rows = token_rows()
    torch.testing.assert_close(logits(ours, rows), logits(theirs, rows), atol=2e-5, rtol=1e-5)
    run_kind("peft", tmp_path / "ours", tmp_path / "again")
    again = PeftModel.from_pretrained(base(workspace), tmp_path / "again")
    assert torch.equal(logits(again, rows), logits(theirs, rows))


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit_file(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit_file


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def to_link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:3000])


KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "bias": (edit(bias="all"), 'bias="all" is not supported'),
    "modules_to_save": (edit(modules_to_save=["lm_head"]), 'modules_to_save=["lm_head"]'),
    "target_parameters": (edit(target_parameters=["experts.w"]), "target_parameters"),
    "layers_to_transform": (edit(layers_to_transform=["0"]), 'layers_to_transform=["0"] must be the number of a layer'),
    "exclude_modules": (edit(exclude_modules=[3]), "exclude_modules=[3] must be a list of names, or text"),
    "qalora": (edit(use_qalora=True), "use_qalora=true"),
    "a key of the future": (edit(use_newlora=3), "use_newlora=3"),
    "pissa": (edit(init_lora_weights="pissa_niter_4"), "changes the weights of the base model"),
    "rank_pattern": (edit(rank_pattern={"q_proj": 5}), "has shape (1, 3, "),
    "broken pattern": (edit(rank_pattern={"(": 7}), "'(' is not a valid regular expression: missing )"),
    "huge repetition": (edit(alpha_pattern={"a{99999999999999999999}": 7}), "the repetition number is too large"),
    "deep pattern": (edit(rank_pattern={"(" * 900 + ")" * 900: 7}), "it is nested too deep"),
    "no number": (edit(lora_alpha="5"), "lora_alpha='5'"),
    "another type": (edit(peft_type="LOHA"), 'peft_type="LOHA"'),
    "another task": (edit(task_type="SEQ_CLS"), 'task_type="SEQ_CLS"'),
    "other rank": (edit(r=4), "has shape (1, 3, "),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG} is damaged"),
    "no object": (lambda folder: (folder / CONFIG).write_text("[1]"), "not a JSON object"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} is missing"),
    "pickle": (to_pickle, "adapter_model.bin is a pickle"),
    "link": (to_link, "outside its folder"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "half the weights": (cut, "damaged"),
    "missing tensor": (edit_tensors(lambda t: t.pop(KEY)), "lacks model.layers.0.mlp.down_proj.A"),
    "embedding": (edit_tensors(lambda t: t.update({f"{KEY[:16]}e.lora_embedding_A": torch.ones(1)})), "is not part"),
    "not finite": (edit_tensors(lambda t: t[KEY].fill_(torch.nan)), "not finite"),
    "float64": (edit_tensors(lambda t: t.update({KEY: t[KEY].double()})), "torch.float64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stock_lora(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "lora"
    stock(workspace, folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_cannot_be_is_refused_by_name(stock_lora: Path, tmp_path: Path, case: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(stock_lora, source)
    hurt, words = REFUSED[case]
    hurt(source)
    with pytest.raises(CheckpointError) as caught:
        run_kind("from-peft", source, tmp_path / "ours")
    assert words in str(caught.value) and str(source) in str(caught.value), caught.value
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "elsewhere.safetensors"}


def test_a_base_must_be_named(stock_lora: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(stock_lora, source)
    edit(base_model_name_or_path=None)(source)
    with pytest.raises(ConfigError, match="base_model_name_or_path is empty; give the base model with --base"):
        run_kind("from-peft", source, tmp_path / "ours")
    run_kind("from-peft", source, tmp_path / "ours", base="some/base")
    assert open_adapter(tmp_path / "ours").info.base_model == "some/base"


def test_wrong_ways_are_pointed_out(workspace: Path, stock_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="convert it with malora convert"):
        run_kind("adapter", stock_lora, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="adapter of malora_dist already"):
        run_kind("from-peft", workspace / "runs" / "lora" / "adapter", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="--to peft takes lora, dora;.* is a malora adapter"):
        run_kind("peft", workspace / "runs" / "malora", tmp_path / "ours")


def test_a_checkpoint_is_a_source_too(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "runs" / "dora", tmp_path / "run")
    step = make_checkpoint(tmp_path / "run")
    run_kind("peft", step, tmp_path / "peft")
    theirs, ours = open_peft(tmp_path / "peft"), open_adapter(workspace / "runs" / "dora")
    assert all(torch.equal(theirs.read(name), ours.read(name)) for name in ours.shapes)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_gpt2_comes_and_goes(tmp_path: Path) -> None:
    """PEFT notes of Conv1D that the base's weights lie the other way round; the factors do not."""
    family_model("gpt2").save_pretrained(tmp_path / "model")
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    theirs = get_peft_model(family_model("gpt2"), config)
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "stock")
    run_kind("from-peft", tmp_path / "stock", tmp_path / "ours")
    run_kind("peft", tmp_path / "ours", tmp_path / "again")
    ours, rows = family_model("gpt2"), [torch.arange(3, 33)]
    load_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(ours, rows), logits(theirs.eval(), rows), atol=2e-5, rtol=1e-4)
    again = PeftModel.from_pretrained(family_model("gpt2"), tmp_path / "again")
    assert torch.equal(logits(again, rows), logits(theirs, rows))
