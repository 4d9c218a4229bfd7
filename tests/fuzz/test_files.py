"""Files of adapters and checkpoints that are almost right: read, or refused in words that name the file."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from malora_dist.adapters.adapted_layers import adapter_state_dict
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io.folder import CONFIG, WEIGHTS, AdapterInfo, save_adapter
from malora_dist.adapters.io.peft import open_lora
from malora_dist.adapters.loading import put_adapter
from malora_dist.adapters.methods import mixture_spec
from malora_dist.checkpoint.layout import MANIFEST, seal
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.cli.inspect.detect import inspect
from malora_dist.cli.inspect.lines import lines
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.tensor_file import LENGTH_BYTES, read_elements, read_header
from tests.checkpoint.samples import save
from tests.fuzz.mutate import broken_bytes, broken_text, mutated, safetensors_file
from tests.tiny_models import tiny_llama

KINDS = ("malora", "molora", "lora", "peft")
# What PEFT writes and we do not.
OF_PEFT = {
    "rank_pattern": {"k_proj": 5},
    "alpha_pattern": {r".*\.layers\.7\..*": 3},
    "init_lora_weights": True,
    "modules_to_save": None,
    "layers_to_transform": None,
    "fan_in_fan_out": False,
    "peft_version": "0.19.0",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each kind on one small model, and a checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    for method in KINDS[:3]:
        model = tiny_llama()
        info = AdapterInfo(
            spec=mixture_spec(method, num_experts=4, r=3), target_modules=("q_proj",), base_model="b", lora_dropout=0.1
        )
        inject_adapters(model, info.spec, info.target_modules)
        save_adapter(folder / method, info, adapter_state_dict(model), "# a card\n")
    shutil.copytree(folder / "lora", folder / "peft")
    config = json.loads((folder / "peft" / CONFIG).read_text())
    del config["malora"]
    (folder / "peft" / CONFIG).write_text(json.dumps(config | OF_PEFT))
    save(CheckpointStore(folder / "checkpoints"), 7)
    return folder


def damage_config(draw: Random, folder: Path) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    if draw.random() < 0.5:
        config.get("malora", {}).pop("weights_sha256", None)
    text = json.dumps(mutated(draw, config)) if draw.random() < 0.7 else broken_text(draw, json.dumps(config))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def damage_weights(draw: Random, folder: Path) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header, data = json.loads(content[LENGTH_BYTES:end]), content[end:]
    kind = draw.choice(("bytes", "header", "text", "twice", "swap", "deep"))
    if kind == "bytes":
        path.write_bytes(broken_bytes(draw, content))
    elif kind == "twice":
        key = draw.choice([key for key in header if key != "__metadata__"])
        text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
        path.write_bytes(safetensors_file(None, data, text))
    elif kind == "text":
        path.write_bytes(safetensors_file(None, data, broken_text(draw, json.dumps(header))))
    elif kind == "header":
        path.write_bytes(safetensors_file(mutated(draw, header), data))
    else:
        tensors = load_file(path)
        first, second = draw.sample(sorted(tensors), 2)
        other = second if kind == "swap" else ".".join(first[:1] * 2000)
        moved = tensors.pop(first)
        tensors |= {first: tensors[second], second: moved} if kind == "swap" else {other: moved}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_adapter_folders(made: Path, draws: Iterator[Random], tmp_path: Path) -> None:
    model, folder, taken = tiny_llama(), tmp_path / "adapter", 0
    for draw in draws:
        shutil.rmtree(folder, ignore_errors=True)
        kind = draw.choice(KINDS)
        shutil.copytree(made / kind, folder)
        sealed = kind != "peft"
        before = load_file(folder / WEIGHTS)
        changed = draw.random() < 0.5
        (damage_weights if changed else damage_config)(draw, folder)
        try:
            adapter = open_lora(folder)
            tensors = {name: adapter.read(name) for name in adapter.shapes}
            assert tensors and all(tensor.numel() for tensor in tensors.values())
            # Damaged weights are never taken for others, except by who takes the checksum out of the config.
            assert not (changed and sealed) or all(
                torch.equal(a, b) for a, b in zip(load_file(folder / WEIGHTS).values(), before.values(), strict=True)
            )
            put_adapter(model, adapter)
            model = tiny_llama()
            taken += 1
        except CheckpointError as error:
            assert folder.name in str(error) and len(str(error)) < 3000
        except ConfigError as error:
            assert "target" in str(error), error
        facts = inspect(folder)
        assert all(isinstance(line, str) for line in lines(facts)) and json.dumps(facts)
    assert taken


def test_headers(made: Path, draws: Iterator[Random], tmp_path: Path) -> None:
    path, taken = tmp_path / WEIGHTS, 0
    for draw in draws:
        shutil.copyfile(made / draw.choice(KINDS) / WEIGHTS, path)
        damage_weights(draw, tmp_path)
        try:
            places = read_header(path)
        except ValueError as error:
            assert str(error)
            continue
        for place in places.values():
            assert read_elements(path, place, 0, place.numel).numel() == place.numel
        taken += 1
    assert taken


def resealed(draw: Random, manifest: dict[str, Any]) -> str:
    """A changed manifest that says the right checksum of itself, as one who writes it would."""
    return seal(mutated(draw, manifest))


def test_manifests(made: Path, draws: Iterator[Random], tmp_path: Path) -> None:
    folder = tmp_path / "step-000007"
    shutil.copytree(made / "checkpoints" / "step-000007", folder)
    path = folder / MANIFEST
    before = path.read_bytes()
    manifest = {key: value for key, value in json.loads(before).items() if key != "manifest_sha256"}
    ways: list[Callable[[Random], bytes]] = [
        lambda draw: resealed(draw, manifest).encode("utf-8", "surrogatepass"),
        lambda draw: broken_bytes(draw, before),
        lambda draw: broken_text(draw, before.decode()).encode("utf-8", "surrogatepass"),
    ]
    taken = 0
    for draw in draws:
        path.write_bytes(draw.choice(ways)(draw))
        try:
            checkpoint = Checkpoint.open(folder)
            checkpoint.verify()
            for kind in ("adapter", "optimizer", "rng"):
                assert all(checkpoint.read(kind, name).numel() for name in checkpoint.names(kind))
            taken += 1
        except CheckpointError as error:
            assert folder.name in str(error) and len(str(error)) < 5000
        facts = inspect(folder)
        assert all(isinstance(line, str) for line in lines(facts)) and json.dumps(facts)
    assert taken
