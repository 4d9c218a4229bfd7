"""Trainer and the files of adapters: it saves adapters, goes on from them, and loads the best at the end."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from malora_dist import MaloraConfig, MaloraModel, get_malora_model, load_adapter
from malora_dist.adapters.adapted_layers import adapter_state_dict
from malora_dist.errors import CheckpointError
from tests.tiny_models import tiny_llama

IDS = torch.arange(40) % 61
SMALL: dict[str, Any] = {"r": 3, "num_experts": 4}


def adapted(**arguments: Any) -> Any:
    return get_malora_model(tiny_llama(), MaloraConfig(**SMALL | arguments))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}


def train(model: Any, folder: Path, steps: int, resume: bool = False, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "save_steps": 1, "logging_steps": 1} | settings
    settings |= {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), max_steps=steps, **settings)
    rows = [{"input_ids": (IDS + number) % 61, "labels": (IDS + number) % 61} for number in range(8)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "reentrant"), [("malora", True), ("dora", False)])
def test_trainer_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    tmp_path: Path, method: str, reentrant: bool
) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    whole = adapted(method=method)
    train(whole, tmp_path / "whole", 3, **options)
    train(adapted(method=method), tmp_path / "parts", 2, **options)
    last = tmp_path / "parts" / "checkpoint-2"
    assert os.path.samefile(last / "model.safetensors", last / "adapter_model.safetensors")
    again = adapted(method=method)
    train(again, tmp_path / "parts", 3, resume=True, **options)
    wanted = state(whole)
    for name, tensor in state(again).items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)
    loaded = tiny_llama()
    load_adapter(loaded, tmp_path / "parts" / "checkpoint-3")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state(loaded).items())


@pytest.mark.filterwarnings("ignore")
def test_trainer_loads_the_best_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1e-3}
    model = adapted()
    trainer = train(model, tmp_path, 3, **settings, metric_for_best_model="loss", greater_is_better=True)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    loaded = MaloraModel.from_pretrained(tiny_llama(), best)
    assert all(torch.equal(tensor, state(model)[name]) for name, tensor in state(loaded).items())
    assert "missing keys" not in caplog.text


def test_the_tensors_of_a_file_are_a_state_dict(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, other = adapted(method="lora"), adapted(method="lora", seed=3)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.B)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert other.load_state_dict(tensors) == ([], [])
    assert all(torch.equal(tensor, state(model)[name]) for name, tensor in state(other).items())
    key, before = list(tensors)[-1], state(other)
    tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=f"{key}: the state dict has no such tensor"):
        other.load_state_dict({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(CheckpointError, match=r"the state dict has shape \(2,\)"):
        other.load_state_dict(tensors | {key: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"^base_model.model.more: the adapter has no such tensor \(1 unknown\)"):
        other.load_state_dict(tensors | {"base_model.model.more": torch.zeros(2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(other).items())
    found = other.load_state_dict(tensors | {"base_model.model.more": torch.zeros(2)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], ["base_model.model.more"])
    assert all(torch.equal(tensor, state(model)[name] + 1) for name, tensor in state(other).items())
    other.load_state_dict(adapted(method="lora").state_dict())


@pytest.mark.parametrize("damage", ["not finite", "shape"])
def test_an_adapter_that_is_there_is_not_half_overwritten(tmp_path: Path, damage: str) -> None:
    """The last tensor of a folder of PEFT, which has no checksum, is what cannot be loaded."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    model = adapted(method="lora", target_modules=["q_proj"])
    before = state(model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    last = list(tensors)[-1]
    tensors[last] = tensors[last].log() if damage == "not finite" else torch.zeros(60, 3)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"not finite|has shape {re.escape('(1, 60, 3)')}"):
        model.load_adapter(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_checkpoint_of_several_adapters(tmp_path: Path) -> None:
    """Trainer's second name is for the one that is trained; a file system may have no second names."""
    model = adapted()
    model.add_adapter("other", MaloraConfig(method="lora", r=2))
    model.set_adapter("other")
    for _ in range(2):
        model.save_pretrained(tmp_path / "checkpoint-5")
    folder = tmp_path / "checkpoint-5"
    assert os.path.samefile(folder / "model.safetensors", folder / "other" / "adapter_model.safetensors")


def test_where_files_have_no_second_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    adapted().save_pretrained(tmp_path / "checkpoint-1")
    written = tmp_path / "checkpoint-1"
    assert (written / "model.safetensors").read_bytes() == (written / "adapter_model.safetensors").read_bytes()
