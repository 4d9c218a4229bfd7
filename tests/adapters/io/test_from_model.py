"""A model of transformers with adapters, saved by whoever saves models: its adapter comes back, no random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from malora_dist import inject_adapters, load_adapter, mixture_spec
from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict, mixture_layers
from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.io.folder import open_adapter, read_adapter_info, save_adapter, write_adapter_folder
from malora_dist.adapters.io.from_model import save_model_adapter
from malora_dist.adapters.io.peft import open_lora, open_peft
from malora_dist.adapters.methods import METHODS
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.reshard import reshard
from malora_dist.cli.inspect.detect import inspect
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.models.load import load_base_model, load_tokenizer
from malora_dist.report import write_report
from tests.multiprocess import ROOT
from tests.tiny_models import byte_tokenizer, save_tiny_llama, tiny_llama

IDS = torch.arange(40)[None] % 61
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def adapted(method: str = "malora", model: Any = None, **options: Any) -> Any:
    model = tiny_llama() if model is None else model
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3), **options)
    for number, (_, layer) in enumerate(mixture_layers(model)):
        nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("fuse_projections", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_save_pretrained_writes_the_adapter(tmp_path: Path, method: str, fuse_projections: bool) -> None:
    model = adapted(method, lora_dropout=0.1, fuse_projections=fuse_projections)
    model.save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    other = tiny_llama()
    assert load_adapter(other, str(tmp_path)).lora_dropout == 0.1
    torch.testing.assert_close(other(IDS).logits, model.eval()(IDS).logits)
    other.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("targets", [["all-linear"], [r".*\.1\..*_proj"]])
def test_targets_that_are_no_ends_of_names_come_back(tmp_path: Path, targets: list[str]) -> None:
    model = adapted("lora", target_modules=targets)
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_from_pretrained_fills_nothing_with_random_numbers(tmp_path: Path) -> None:
    """Without a config.json the folder is no model; PEFT, which transformers asks, has no such method."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    save_tiny_llama(tmp_path / "base")
    model = adapted(model=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    assert read_adapter_info(tmp_path / "saved").base_model == str(tmp_path / "base")
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(Exception, match="MALORA|config.json"):
            kind.from_pretrained(tmp_path / "saved")


def test_a_lora_is_put_on_its_base_by_transformers_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_tiny_llama(tmp_path / "base")
    model = adapted("lora", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_values_may_come_from_elsewhere(tmp_path: Path) -> None:
    """As Trainer hands on what ZeRO-3 has gathered; what is in parts is refused."""
    model = adapted(fuse_projections=True)
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, adapter_state_dict(model)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for _, layer in mixture_layers(model):
        layer.B.data = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"B has shape \(0,\) instead of .*spread over processes"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict=state)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state_dict(other).items())
    state.popitem()
    with pytest.raises(CheckpointError, match="state_dict lacks model"):
        model.save_pretrained(tmp_path, state_dict={})


def test_what_is_trained_beside_the_adapter_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"^lm_head.weight is trained and no part of the adapter"):
        model.save_pretrained(tmp_path)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"^model.norm.weight and 1 more are trained"):
        save_model_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_only_the_main_process_writes_and_nothing_goes_to_the_hub(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path / "none", push_to_hub=True)
    remove_adapters(model)
    model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no adapters"):
        save_model_adapter(model, tmp_path / "none")


def train(model: Any, folder: Path, steps: int = 2) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=1, learning_rate=0.1,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, gradient_checkpointing=True,
    )  # fmt: skip
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_trainer_saves_what_it_has_trained(tmp_path: Path) -> None:
    model = adapted()
    first = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    trainer = train(model, tmp_path)
    assert FILES <= {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-2", "final"):
        other = tiny_llama()
        load_adapter(other, tmp_path / folder)
        assert torch.equal(other(IDS).logits, model.eval()(IDS).logits)
    assert all(not torch.equal(tensor, first[name]) for name, tensor in adapter_state_dict(model).items())
    other = tiny_llama()
    load_adapter(other, tmp_path / "checkpoint-1")
    assert not torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["malora", "dora"])
def test_trainer_trains_adapters_on_a_base_that_bitsandbytes_has_quantised(tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128, noise=0.0)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    # bitsandbytes multiplies otherwise where nothing wants a gradient.
    model.requires_grad_(False)
    expected = model(IDS).logits
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    train(model, tmp_path)
    with torch.no_grad():
        trained = model.eval()(IDS).logits
        remove_adapters(model)
        assert torch.equal(model(IDS).logits, expected) and not torch.allclose(trained, expected)
        load_adapter(model, tmp_path / "checkpoint-2")
        assert torch.equal(model(IDS).logits, trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["malora", "dora"])
def test_a_base_that_accelerate_has_offloaded(tmp_path: Path, method: str) -> None:
    """Its weights are on no device between forwards; the adapter is where the layer computes."""
    from transformers import AutoModelForCausalLM

    save_tiny_llama(tmp_path / "base")
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "off"
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    expected = model(IDS).logits
    adapted(method, model)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
    model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for _, parameter in adapter_parameters(model))
    model.save_pretrained(tmp_path / "adapter")
    other = tiny_llama()
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_text(tmp_path: Path, kind: Any) -> None:
    """Every function that README and docs name takes what a person writes."""
    save_tiny_llama(tmp_path / "base", vocab_size=259)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base, folder = kind(tmp_path / "base"), kind(tmp_path / "adapter")
    model = load_base_model(base, load_in_4bit=False, dtype=torch.float32)
    assert load_tokenizer(base).eos_token == "</s>"
    adapted("lora", model)
    info, state = save_model_adapter(model, folder), adapter_state_dict(model)
    save_adapter(folder, info, state, "card")
    write_adapter_folder(
        kind(tmp_path / "other"), info, {n: tuple(t.shape) for n, t in state.items()}, state.values(), ""
    )
    for opened in (open_adapter(folder), open_lora(kind(tmp_path / "other"))):
        assert opened.shapes.keys() == state.keys() and opened.info == read_adapter_info(folder)
    assert inspect(folder)["kind"] == "adapter"
    assert write_report(kind(tmp_path)).is_file()
    for function in (Checkpoint.open, open_peft):
        with pytest.raises(CheckpointError):
            function(folder)
    with pytest.raises(CheckpointError):
        reshard(folder, kind(tmp_path / "target"), 2)


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_docs(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    save_tiny_llama(tmp_path / "base")
    names: dict[str, Any] = {
        "base": tmp_path / "base",
        "folder": tmp_path / "adapter",
        "rows": [{"input_ids": IDS[0], "labels": IDS[0]}] * 2,
        "arguments": TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[]),
    }
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert torch.equal(names["again"](IDS).logits, names["model"].eval()(IDS).logits)
