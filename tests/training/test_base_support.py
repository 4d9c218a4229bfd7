"""What is refused of a base before a row is tokenised or a weight read, and what is only said."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from malora_dist.config import AdapterConfig, RunConfig, config_from_dict, load_config
from malora_dist.errors import ConfigError
from malora_dist.models.load import load_base_model, load_tokenizer
from malora_dist.training.base_support import check_local_support, check_support, family_targets
from tests.commands import malora
from tests.config.recipes import recipe
from tests.families import family_config, family_model
from tests.tiny_models import byte_tokenizer, save_tiny_llama, tiny_config


def _config(folder: Path, **model: Any) -> RunConfig:
    return config_from_dict(recipe(model={"name_or_path": str(folder), **model}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and tokenizer that belong together; its weights cannot be read."""
    save_tiny_llama(tmp_path, vocab_size=259)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("malora_dist.models.weights.reader.read_elements", lambda *_: pytest.fail("read a weight"))
    return tmp_path


def test_a_base_that_fits_has_nothing_to_say(folder: Path) -> None:
    config = _config(folder)
    assert check_support(config, folder, load_tokenizer(folder)).notes == ()
    assert check_local_support(config) == ()


def test_a_model_that_is_elsewhere_is_not_looked_at(tmp_path: Path) -> None:
    assert check_local_support(_config(tmp_path / "gone.gguf")) == ()
    assert check_local_support(config_from_dict(recipe(model={"name_or_path": "nobody/no-such-model"}))) == ()


def test_weights_that_are_not_there_are_named_all_at_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = "no weight for 2 of the model's tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight"
    with pytest.raises(ConfigError, match=words):
        check_local_support(_config(folder))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_files_that_are_missing_or_cut_are_named(folder: Path, damage: str) -> None:
    """A download that was interrupted; every such file at once, before a row is tokenised."""
    (folder / "model.safetensors").unlink()
    save_tiny_llama(folder, vocab_size=259, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))[1:3]
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        if damage == "cut":
            shard.write_bytes(content[: len(content) // 2])
    for check in (check_local_support, lambda config: check_support(config, folder, load_tokenizer(folder))):
        with pytest.raises(ConfigError) as caught:
            check(_config(folder))
        assert all(f"{shard} is missing or damaged" in str(caught.value) for shard in shards)


def test_weights_of_another_size_are_named_all_at_once(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"intermediate_size": 96}))
    with pytest.raises(ConfigError) as caught:
        check_local_support(_config(folder))
    for layer in range(2):
        assert f"layers.{layer}.mlp.gate_proj.weight has shape (80, 48), the config says (96, 48)" in str(caught.value)


def test_tensors_that_the_model_does_not_use_are_a_note(folder: Path) -> None:
    """Transformers warns of them; buffers of its older versions say nothing."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(48),
        "model.layers.7.mlp.up_proj.weight": torch.ones(2),
    }
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (note,) = check_local_support(_config(folder))
    assert note.startswith("2 of the tensors in the model's files are not used by its config.json: model.layers.0.")
    assert note.endswith("q_proj.bias, model.layers.7.mlp.up_proj.weight")


def test_weights_stored_as_integers_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales are elsewhere; as they are, they are numbers without meaning."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"weight {name} is stored as int8: only bitsandbytes' nf4"):
        check_local_support(_config(folder))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"weight {name} is stored as int8"):
        load_base_model(folder, load_in_4bit=False)


def test_tokens_without_a_row_are_refused(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"<think> 259.*its embedding has 259"):
        check_local_support(_config(folder))


def test_padding_without_a_row_is_a_note(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    facts = check_support(_config(folder), folder, load_tokenizer(folder))
    assert facts.spare_tokens == {259: "[PAD]"} and "no row for [PAD]" in facts.notes[0]


def test_an_end_without_a_row_is_refused_though_it_pads_too(folder: Path) -> None:
    """It ends every row."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"1 token for which the model has no row \(<end> 259\)"):
        check_local_support(_config(folder))


def test_a_configuration_alone_is_looked_at(tmp_path: Path) -> None:
    family_model("gemma2").config.save_pretrained(tmp_path)
    assert check_local_support(_config(tmp_path)) == ()
    with pytest.raises(ConfigError, match="model.attn_implementation=sdpa: Gemma2ForCausalLM does not compute with it"):
        check_local_support(_config(tmp_path, attn_implementation="sdpa"))


def test_what_training_alone_needs_is_not_asked_of_an_evaluation(tmp_path: Path) -> None:
    """A state runs through the rows of Mamba, and it has no q_proj."""
    model = family_model("mamba", vocab_size=259)
    model.save_pretrained(tmp_path)
    config, tokenizer = _config(tmp_path), byte_tokenizer()
    with pytest.raises(ConfigError, match="adapter.target_modules: 'q_proj' matches no module"):
        check_support(config, tmp_path, tokenizer)
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"target_modules": ("in_proj",)})})
    with pytest.raises(ConfigError, match="per_device_train_batch_size=4 must be 1 for mamba: its layers carry state"):
        check_support(config, tmp_path, tokenizer)
    assert check_support(_config(tmp_path), tmp_path, tokenizer, trains=False).notes == ()


def test_checkpointing_that_a_base_has_not_is_refused(tmp_path: Path) -> None:
    family_model("ctrl").config.save_pretrained(tmp_path)
    changes = {"model": {"name_or_path": str(tmp_path)}, "adapter": {"target_modules": ["Wq"]}}
    for checkpointing, words in ((True, "gradient_checkpointing=true must be false for CTRLLMHeadModel"), (False, "")):
        config = config_from_dict(recipe(train={"gradient_checkpointing": checkpointing}, **changes))
        with pytest.raises(ConfigError, match=words) if checkpointing else nullcontext():
            check_local_support(config)


def test_a_base_that_draws_at_random_is_refused(tmp_path: Path) -> None:
    family_model("reformer").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="ReformerModelWithLMHead cannot be trained on: its ReformerLayer draws"):
        check_local_support(_config(tmp_path))


def test_linears_of_which_nothing_is_known_are_said(tmp_path: Path) -> None:
    """ProphetNet's attention to an encoder is never called."""
    family_model("prophetnet", vocab_size=259).save_pretrained(tmp_path)
    settings = recipe(
        model={"name_or_path": str(tmp_path)},
        adapter={"target_modules": ["all-linear"], "r": 2, "shared_r": 2},
        train={"per_device_train_batch_size": 1},
    )
    (note,) = check_support(config_from_dict(settings), tmp_path, byte_tokenizer()).notes
    assert note.startswith("it is not known before a run which linear layers of ProphetNetForCausalLM process text")


def test_a_format_that_is_not_read_is_refused(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="quant_method='gptq'"):
        check_support(_config(folder), folder, byte_tokenizer(), torch.float32)


def test_code_that_runs_is_said(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": "own.Own"}}))
    assert check_local_support(_config(folder)) == ()
    (note,) = check_local_support(_config(folder, trust_remote_code=True))
    assert note == f"model.trust_remote_code=true: code of {folder} is run (own.Own)"


def test_targets_are_compared_with_the_models_linears(folder: Path) -> None:
    """All mistakes at once, before a row is tokenised or a weight read."""
    config = config_from_dict(
        recipe(model={"name_or_path": str(folder)}, adapter={"target_modules": ["query", "lm_heads", "up_proj"]})
    )
    words = r"target_modules: 'query' .*did you mean q_proj or k_proj or v_proj\?; 'lm_heads' .*up_proj \(48 -> 80\)"
    with pytest.raises(ConfigError, match=words):
        check_local_support(config)
    with pytest.raises(ConfigError, match=words):
        check_support(config, folder, load_tokenizer(folder))
    head = config_from_dict(recipe(model={"name_or_path": str(folder)}, adapter={"target_modules": ["lm_head"]}))
    with pytest.raises(ConfigError, match="'lm_head' matches lm_head, the output head"):
        check_local_support(head)


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
