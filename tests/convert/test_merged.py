"""Adapters merged into their base: the same logits, the same folder otherwise, and what cannot be merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict
from malora_dist.adapters.inject import inject_adapters, remove_adapters
from malora_dist.adapters.io.folder import AdapterInfo, open_adapter, save_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.adapters.merge import merged_weight
from malora_dist.adapters.methods import mixture_spec
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.models.load import load_base_model
from malora_dist.models.weights.reader import INDEX, SINGLE
from tests.convert.made import base, logits, make_checkpoint, run_kind, token_rows
from tests.families import family_model

ADAPTED = ("q_proj.weight", "v_proj.weight", "down_proj.weight")


def in_shards(model: Path, target: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A copy of a model folder with its weights in two files and another dtype."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns(SINGLE))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / SINGLE).items()}
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, target / file)
    (target / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return tensors


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_is_the_adapted_model(workspace: Path, tmp_path: Path, method: str) -> None:
    said = run_kind("merged", workspace / "runs" / method, tmp_path / "merged", verify=True)
    assert said[0].startswith("merged 6 weights in float32; rounding to it is ") and "4 bits" in said[1], said
    adapted, rows = base(workspace), token_rows()
    load_adapter(adapted, workspace / "runs" / method)
    wanted = logits(adapted, rows)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, rows), wanted, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(logits(base(workspace), rows), wanted, atol=1e-2)
    before = AutoTokenizer.from_pretrained(workspace / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == before.get_vocab()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (workspace / "model" / "config.json").read_bytes()
    assert "merged" in (tmp_path / "merged" / "README.md").read_text()


def test_shards_and_dtype_stay(workspace: Path, tmp_path: Path) -> None:
    stored = in_shards(workspace / "model", tmp_path / "model", torch.bfloat16)
    run_kind("merged", workspace / "runs" / "lora", tmp_path / "merged", base=str(tmp_path / "model"), verify=True)
    assert (tmp_path / "merged" / INDEX).read_bytes() == (tmp_path / "model" / INDEX).read_bytes()
    adapter = open_adapter(workspace / "runs" / "lora")
    for file in tmp_path.glob("model/*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert tensor.dtype == torch.bfloat16
            if name.endswith(ADAPTED):
                factors = adapter.read_layer(name.removesuffix(".weight"))
                product = factors["B"][0] @ factors["A"][0]
                wanted = stored[name].float() + adapter.info.spec.scaling * product
                assert (tensor - wanted).abs().le(wanted.abs() * 2**-8 + 1e-30).all() and not tensor.equal(stored[name])
            else:
                assert torch.equal(tensor, stored[name])


def test_names_of_the_file_stay_and_all_of_the_tokenizer(workspace: Path, tmp_path: Path) -> None:
    """A file may name tensors otherwise than the model does, and a folder hold templates of its own."""
    shutil.copytree(workspace / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model" / SINGLE, metadata={"format": "pt"})
    (tmp_path / "model" / "modeling_own.py").write_text("")
    texts = ("chat_template.jinja", "merges.txt", "vocab.txt", "own.tiktoken", "additional_chat_templates/tool.jinja")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    for name in texts:
        (tmp_path / "model" / name).write_text(name)
    base_folder = str(tmp_path / "model")
    run_kind("merged", workspace / "runs" / "lora", tmp_path / "merged", base=base_folder, verify=True)
    run_kind("merged", workspace / "runs" / "lora", tmp_path / "plain")
    merged, plain = load_file(tmp_path / "merged" / SINGLE), load_file(tmp_path / "plain" / SINGLE)
    assert merged.keys() == renamed.keys()
    assert all(torch.equal(tensor, merged[name.removeprefix("model.")]) for name, tensor in plain.items())
    assert all((tmp_path / "merged" / name).read_text() == name for name in texts)
    assert not list((tmp_path / "merged").glob("*.py"))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_weights_of_conv1d_are_merged_as_they_lie(tmp_path: Path, method: str) -> None:
    """Those of GPT-2 lie as (I, O), square ones too."""
    model = family_model("gpt2", scale=4.0)
    model.save_pretrained(tmp_path / "model")
    inject_adapters(model, mixture_spec(method, r=3), ["c_attn", "c_proj"])
    for name, parameter in adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    run_kind("merged", tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "model"))
    rows = [torch.arange(3, 33)]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, rows), logits(model, rows), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(logits(family_model("gpt2", scale=4.0), rows), logits(model, rows), atol=1e-2)


def test_dora_rows_have_their_magnitudes() -> None:
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((5, 7), (1, 2, 7), (1, 5, 2)))
    factors = {"A": A, "B": B, "magnitude": torch.arange(5.0)}
    merged = merged_weight(W, factors, 0.5)
    torch.testing.assert_close(merged.norm(dim=1), factors["magnitude"])
    plain = W + 0.5 * B[0] @ A[0]
    torch.testing.assert_close(merged[1:] / merged[1:].norm(dim=1)[:, None], plain[1:] / plain[1:].norm(dim=1)[:, None])


@pytest.mark.parametrize("method", ["malora", "molora", "hydralora"])
def test_routed_mixtures_are_refused(workspace: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(CheckpointError, match="its gate weighs the experts anew for every token") as caught:
        run_kind("merged", workspace / "runs" / method, tmp_path / "merged")
    assert "--to peft-tasks" in str(caught.value) and not list(tmp_path.iterdir())


def test_another_base_is_refused(workspace: Path, tmp_path: Path) -> None:
    tensors = in_shards(workspace / "model", tmp_path / "model")
    name = "model.layers.0.mlp.down_proj.weight"
    shutil.copytree(tmp_path / "model", tmp_path / "narrow")
    file = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"][name]
    held = load_file(tmp_path / "narrow" / file)
    save_file(held | {name: tensors[name][:, 1:].contiguous()}, tmp_path / "narrow" / file)
    with pytest.raises(CheckpointError, match=f"{name} is torch.float32 of shape .* the adapter needs"):
        run_kind("merged", workspace / "runs" / "lora", tmp_path / "merged", base=str(tmp_path / "narrow"))
    held.pop(name)
    save_file(held, tmp_path / "narrow" / file)
    with pytest.raises(ConfigError, match=f"holds no {name}"):
        run_kind("merged", workspace / "runs" / "lora", tmp_path / "merged", base=str(tmp_path / "narrow"))
    shutil.copytree(workspace / "runs" / "lora", tmp_path / "run")
    step = make_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is not the base of .*: its fingerprint"):
        run_kind("merged", step, tmp_path / "merged", base=str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="holds quantised weights; give the unquantised model with --base"):
        run_kind("merged", workspace / "runs" / "lora", tmp_path / "merged", base=str(tmp_path / "model"))
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_a_weight_of_two_layers_is_not_merged_into(tmp_path: Path) -> None:
    """Zamba's attention layers share their weights, and each has an adapter of its own."""
    family_model("zamba").save_pretrained(tmp_path / "model")
    model, spec = load_base_model(tmp_path / "model", load_in_4bit=False), mixture_spec("lora", r=2)
    for targets, merges in (("o_proj",), False), (("layers.0.mamba.out_proj",), True):
        targets_of = inject_adapters(model, spec, targets).target_modules
        info = AdapterInfo(spec=spec, target_modules=targets_of, base_model=str(tmp_path / "model"), lora_dropout=0.0)
        save_adapter(tmp_path / targets[0], info, adapter_state_dict(model), "card")
        remove_adapters(model)
        if merges:
            run_kind("merged", tmp_path / targets[0], tmp_path / "merged")
        else:
            with pytest.raises(
                CheckpointError, match=r"self_attn.o_proj of this base is tied to model.layers.\d.shared"
            ):
                run_kind("merged", tmp_path / targets[0], tmp_path / "merged")


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_is_merged_into_where_the_files_hold_one_of_its_own(tmp_path: Path, differs: bool) -> None:
    """What the configuration says of ties is not all: a stored head that differs is no longer the embedding."""
    tied = family_model("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    head = tensors["model.embed_tokens.weight"] * (1.5 if differs else 1.0)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model" / SINGLE, metadata={"format": "pt"})
    model = load_base_model(tmp_path / "model", dtype=torch.float32, load_in_4bit=False)
    inject_adapters(model, mixture_spec("lora", r=2), ["lm_head", "q_proj"])
    for _, parameter in adapter_parameters(model):
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    arguments = ("merged", tmp_path / "adapter", tmp_path / "merged")
    if not differs:
        with pytest.raises(CheckpointError, match="lm_head of this base is tied to model.embed_tokens, which a merge"):
            run_kind(*arguments, base=str(tmp_path / "model"))
        return
    run_kind(*arguments, base=str(tmp_path / "model"))
    rows = [torch.arange(3, 33)]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, rows), logits(model, rows), atol=2e-5, rtol=2e-5)


def test_an_index_cannot_lead_out_of_the_folder(workspace: Path, tmp_path: Path) -> None:
    in_shards(workspace / "model", tmp_path / "model")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    shutil.copy(tmp_path / "model" / index["weight_map"][first], tmp_path / "outside.safetensors")
    index["weight_map"][first] = "../outside.safetensors"
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no file of its folder"):
        run_kind("merged", workspace / "runs" / "lora", tmp_path / "merged", base=str(tmp_path / "model"))
