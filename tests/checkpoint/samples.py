"""Checkpoints of a small made-up model, whose tensors tell the step and the name they belong to."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malora_dist.checkpoint.layout import ADAPTER_CONFIG, RNG_FILE, FileRecord, Manifest, shard_name
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.shards import file_record, plan_shards, write_shard
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.files.durable import write_text

Tensors = dict[str, dict[str, Tensor]]


def tensors_of(step: int, layers: int = 3, width: int = 40) -> Tensors:
    """By kind: `layers` linears of `width` inputs with the factors of MALoRA, the gate frozen; 2 processes' RNG."""
    shapes = {"gate": (4, width), "shared_A": (5, width), "P": (4, 3, 5), "B": (4, width + 7, 3)}
    adapter: dict[str, Tensor] = {}
    for layer in range(layers):
        for number, (factor, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            name = f"model.layers.{layer}.mlp.up_proj.{factor}"
            adapter[name] = torch.arange(count).view(shape) / count + step + 10 * number + 100 * layer
    trained = {name: tensor for name, tensor in adapter.items() if not name.endswith("gate")}
    optimizer = {f"exp_avg.{name}": -tensor for name, tensor in trained.items()}
    optimizer |= {f"exp_avg_sq.{name}": tensor**2 for name, tensor in trained.items()}
    rng = {f"{rank}.torch": torch.arange(9, dtype=torch.uint8) + rank for rank in range(2)}
    rng |= {f"{rank}.python": torch.tensor([-(2**60), rank]) for rank in range(2)}
    return {"adapter": adapter, "optimizer": optimizer, "rng": rng}


def write_files(folder: Path, tensors: Tensors, shards: int) -> tuple[dict[str, FileRecord], dict[str, dict[str, str]]]:
    """All files but the manifest, and what the manifest must say of them."""
    write_text(folder / ADAPTER_CONFIG, '{"r": 3}\n')
    files = {ADAPTER_CONFIG: file_record(folder / ADAPTER_CONFIG)}
    places: dict[str, dict[str, str]] = {}
    for kind in ("adapter", "optimizer"):
        sizes = {name: tensor.nbytes for name, tensor in tensors[kind].items()}
        groups = plan_shards(sizes, shards, 1)
        for number, names in enumerate(groups, start=1):
            file = shard_name(kind, number, len(groups))
            files[file] = write_shard(folder / file, {name: tensors[kind][name] for name in names})
            places.setdefault(kind, {}).update(dict.fromkeys(names, file))
    files[RNG_FILE] = write_shard(folder / RNG_FILE, tensors["rng"])
    places["rng"] = dict.fromkeys(tensors["rng"], RNG_FILE)
    return files, places


def manifest_of(step: int, files: dict[str, FileRecord], tensors: dict[str, dict[str, str]]) -> Manifest:
    state: dict[str, Any] = {"optimizer_step": step, "window": [0.5, None, 1e-300], "name": "gr\u00fcn"}
    return Manifest(
        malora_dist="0.3.0",
        torch="2.10.0",
        deepspeed="0.19.8",
        transformers="5.23.0",
        step=step,
        topology={"world_size": 4, "ep_size": 2, "zero_stage": 3},
        config={"adapter": {"r": 3, "shared_r": 5}, "data": [1, 2]},
        base={"name": "some/base", "revision": None, "fingerprint": "f00d", "dtype": "bfloat16"},
        state=state,
        files=files,
        tensors=tensors,
    )


def save(store: CheckpointStore, step: int, tensors: Tensors | None = None, shards: int = 2) -> Path:
    """A whole save, as the processes of a run do it together."""
    partial = store.begin(step)
    files, places = write_files(partial, tensors or tensors_of(step), shards)
    return store.commit(step, manifest_of(step, files, places))


def check_tensors(folder: Path, expected: Tensors) -> None:
    """The checkpoint is undamaged, and of its step."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    for kind, tensors in expected.items():
        assert set(checkpoint.names(kind)) == set(tensors)
        assert all(torch.equal(checkpoint.read(kind, name), tensor) for name, tensor in tensors.items())
