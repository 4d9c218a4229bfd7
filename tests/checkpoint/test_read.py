"""A checkpoint is read back bit for bit, and what is damaged is refused by the name of its file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from malora_dist.checkpoint.layout import MANIFEST, RNG_FILE, Manifest
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.shards import file_record
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.errors import CheckpointError
from malora_dist.files.tensor_file import write_tensors
from tests.checkpoint.samples import save, tensors_of

ADAPTER, OPTIMIZER = "adapter-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(CheckpointStore(tmp_path / "checkpoints"), 7)


def test_everything_comes_back(folder: Path) -> None:
    checkpoint, expected = Checkpoint.open(folder), tensors_of(7)
    checkpoint.verify()
    assert checkpoint.folder == folder and checkpoint.manifest == Manifest.read(folder)
    for kind, tensors in expected.items():
        assert sorted(checkpoint.names(kind)) == sorted(tensors)
        for name, tensor in tensors.items():
            assert checkpoint.shape(kind, name) == tuple(tensor.shape)
            found = checkpoint.read(kind, name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
            for start, stop in ((0, 0), (1, 2), (2, tensor.numel())):
                assert torch.equal(checkpoint.read_elements(kind, name, start, stop), tensor.flatten()[start:stop])


def test_the_library_reads_the_shards(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for kind, tensors in tensors_of(7).items():
        for name, tensor in tensors.items():
            assert torch.equal(load_file(folder / manifest["tensors"][kind][name])[name], tensor)


def test_a_reader_made_from_the_document_alone(folder: Path) -> None:
    """docs/checkpoints.md: no code of the package, no library of the format."""
    content = (folder / "manifest.json").read_bytes()
    assert hashlib.sha256(content[:-68]).hexdigest().encode() == content[-68:-4]
    manifest = json.loads(content)
    files = {name: (folder / name).read_bytes() for name in manifest["files"]}
    for name, data in files.items():
        assert {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} == manifest["files"][name]
    for kind, tensors in tensors_of(7).items():
        assert manifest["tensors"][kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            data = files[manifest["tensors"][kind][name]]
            header_end = 8 + int.from_bytes(data[:8], "little")
            entry = json.loads(data[8:header_end])[name]
            first, last = entry["data_offsets"]
            dtype = {"F32": "<f4", "U8": "u1", "I64": "<i8"}[entry["dtype"]]
            values = np.frombuffer(data[header_end + first : header_end + last], dtype).reshape(entry["shape"])
            assert np.array_equal(values, tensor.numpy())


def test_tensors_that_are_not_there(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for call in (checkpoint.read, checkpoint.shape, checkpoint.place):
        with pytest.raises(CheckpointError, match=f"{folder} holds no adapter tensor layer.Q"):
            call("adapter", "layer.Q")


def test_a_flipped_bit_anywhere_is_found_by_the_checksum(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for file in checkpoint.manifest.files:
        content = (folder / file).read_bytes()
        for index in {0, 8, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[min(index, len(content) - 1)] ^= 4
            (folder / file).write_bytes(damaged)
            found = file_record(folder / file).sha256
            with pytest.raises(CheckpointError) as caught:
                checkpoint.verify()
            words = [str(folder / file), found, checkpoint.manifest.files[file].sha256]
            assert all(word in str(caught.value) for word in words)
            with pytest.raises(CheckpointError, match=file):
                checkpoint.verify([file])
            checkpoint.verify(set(checkpoint.manifest.files) - {file})
        (folder / file).write_bytes(content)
    checkpoint.verify()
    with pytest.raises(CheckpointError, match="other is not in the manifest"):
        checkpoint.verify(["other"])


def resealed(folder: Path, file: str) -> None:
    """Let the manifest agree with the bytes of a file that a writer with a fault would have written."""
    manifest = Manifest.read(folder)
    replace(manifest, files=manifest.files | {file: file_record(folder / file)}).write(folder)


def edit_shard(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)
        resealed(folder, file)

    return edit


def edit_header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / ADAPTER).read_bytes()
        changed = change(content)
        assert changed != content
        (folder / ADAPTER).write_bytes(changed)
        resealed(folder, ADAPTER)

    return edit


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {kind: dict(files) for kind, files in Manifest.read(folder).tensors.items()}
        change(tensors)
        replace(Manifest.read(folder), tensors=tensors).write(folder)

    return edit


def link(file: str, to: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shutil.move(folder / file, folder / to)
        os.symlink(to, folder / file)

    return edit


def cut(folder: Path) -> None:
    os.truncate(folder / OPTIMIZER, (folder / OPTIMIZER).stat().st_size - 1)


def as_folder(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / ADAPTER).mkdir()


P0, B1 = "model.layers.0.mlp.up_proj.P", "model.layers.1.mlp.up_proj.B"


def first(tensors: dict[str, Tensor]) -> str:
    return next(iter(tensors))


def file_of(tensors: dict[str, Any], kind: str, name: str) -> str:
    file: str = tensors[kind][name]
    return file


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (lambda folder: (folder / ADAPTER).unlink(), [ADAPTER, "is missing"]),
    "missing config": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json is missing"]),
    "missing rng": (lambda folder: (folder / RNG_FILE).unlink(), [RNG_FILE, "is missing"]),
    "cut short": (cut, [OPTIMIZER, "bytes, the manifest says"]),
    "empty": (lambda folder: os.truncate(folder / OPTIMIZER, 0), [OPTIMIZER, "has 0 bytes, the manifest says"]),
    "link inside": (link(ADAPTER, "other"), [ADAPTER, "symbolic link"]),
    "link outside": (link(ADAPTER, "../other"), [ADAPTER, "symbolic link"]),
    "link of a small file": (link("adapter_config.json", "../other"), ["adapter_config.json", "symbolic link"]),
    "link of the manifest": (link(MANIFEST, "../other"), [MANIFEST, "symbolic link"]),
    "folder": (as_folder, [ADAPTER, "not a plain file"]),
    "other step": (lambda folder: replace(Manifest.read(folder), step=8).write(folder), [MANIFEST, "step=8"]),
    "tensor lost": (edit_shard(ADAPTER, lambda tensors: tensors.pop(first(tensors))), [ADAPTER, "holds no model."]),
    "tensor not listed": (edit_shard(ADAPTER, lambda t: t.update(x=torch.ones(2))), [ADAPTER, "holds x, which"]),
    "listed elsewhere": (
        edit_manifest(lambda t: t["adapter"].update({P0: file_of(t, "optimizer", f"exp_avg.{B1}")})),
        ["optimizer-", f"holds no {P0}"],
    ),
    "listed in no shard": (
        edit_manifest(lambda t: t["adapter"].update({P0: "adapter_config.json"})),
        ["adapter_config.json", f"holds no {P0}"],
    ),
    "two kinds": (
        edit_manifest(lambda t: t["rng"].update({P0: file_of(t, "adapter", P0)})),
        ["adapter-", "two kinds"],
    ),
    "bf16": (edit_shard(ADAPTER, lambda t: t.update({first(t): t[first(t)].bfloat16()})), [ADAPTER, "bfloat16"]),
    "f64 moments": (
        edit_shard(OPTIMIZER, lambda t: t.update({first(t): t[first(t)].double()})),
        ["float64", "float32"],
    ),
    "float rng": (edit_shard(RNG_FILE, lambda t: t.update({first(t): torch.ones(2)})), ["float32", "uint8 or int64"]),
    "moment of another shape": (
        edit_shard(OPTIMIZER, lambda t: t.update({first(t): t[first(t)][:1].clone()})),
        [OPTIMIZER, "has shape (1,", "its adapter tensor"],
    ),
    "header of no length": (edit_header(lambda content: b"\xff" * 8 + content[8:]), [ADAPTER, "longer than the file"]),
    "header of no JSON": (edit_header(lambda content: content.replace(b"{", b"x", 1)), [ADAPTER, "damaged"]),
    "header without a shape": (edit_header(lambda content: content.replace(b'"shape"', b'"shope"', 1)), ["no dtype"]),
    "header of odd dtype": (edit_header(lambda content: content.replace(b'"F32"', b'"F42"', 1)), ["dtype F42"]),
    "header of odd size": (edit_header(lambda content: content.replace(b'shape": [4, ', b'shape": [-4,', 1)), ["[-4"]),
    "header beyond the end": (
        edit_header(lambda content: content[:-4]),
        [ADAPTER, "before its last tensor"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_opened(folder: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"exp_avg.x.B"}, "exp_avg.x.B comes without exp_avg_sq.x.B"),
        ({"exp_avg.x.P", "exp_avg_sq.x.P"}, "must be exp_avg or exp_avg_sq of an adapter tensor"),
        ({"momentum.x.B"}, "momentum.x.B must be exp_avg or exp_avg_sq"),
    ],
)
def test_moments_are_pairs_of_an_adapter_tensor(tmp_path: Path, names: set[str], words: str) -> None:
    tensors = {"adapter": {"x.B": torch.ones(2)}, "optimizer": dict.fromkeys(names, torch.ones(2)), "rng": {}}
    with pytest.raises(CheckpointError, match=words):
        save(CheckpointStore(tmp_path), 1, tensors, shards=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["adapter", "optimizer"])
def test_numbers_that_are_not_finite_are_refused_when_read(folder: Path, kind: str, value: float) -> None:
    name = P0 if kind == "adapter" else f"exp_avg_sq.{P0}"
    file = Manifest.read(folder).tensors[kind][name]
    tensors = load_file(folder / file)
    tensors[name].view(-1)[5] = value
    (folder / file).unlink()
    write_tensors(folder / file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.values())
    resealed(folder, file)
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    with pytest.raises(CheckpointError, match=f"{folder / file}: {name} has 1 of 60 elements that are NaN or infinite"):
        checkpoint.read(kind, name)
    with pytest.raises(CheckpointError, match=f"{name} has 1 of 3 elements"):
        checkpoint.read_elements(kind, name, 4, 7)
    assert checkpoint.read_elements(kind, name, 6, 60).numel() == 54


def test_a_file_that_vanishes_or_shrinks_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    file = checkpoint.manifest.tensors["adapter"][P0]
    os.truncate(folder / file, 100)
    with pytest.raises(CheckpointError, match=f"{folder / file} is damaged: the file ends before"):
        checkpoint.read("adapter", P0)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{folder / file} cannot be read: No such file"):
        checkpoint.read("adapter", P0)
    with pytest.raises(CheckpointError, match=f"{folder / file} cannot be read: No such file"):
        checkpoint.verify()


def test_the_hubs_cache_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    """From a snapshot to the blobs of its own repository; a link elsewhere is one that leads out."""
    repository = tmp_path / "models--a--b"
    run, blobs = repository / "snapshots" / ("0a" * 20), repository / "blobs"
    step = run / "checkpoints" / folder.name
    step.mkdir(parents=True)
    blobs.mkdir()
    (folder.parent / "best").write_text(f"{folder.name}\n")
    for file in [*folder.iterdir(), folder.parent / "best"]:
        shutil.copy(file, blobs / file.name)
        place = step if file.parent == folder else step.parent
        (place / file.name).symlink_to(os.path.relpath(blobs / file.name, place))
    checkpoint = Checkpoint.open(step)
    checkpoint.verify()
    assert torch.equal(checkpoint.read("rng", "0.torch"), tensors_of(7)["rng"]["0.torch"])
    store = CheckpointStore(step.parent)
    assert store.latest() == store.best() == step
    for name in (RNG_FILE, MANIFEST):
        (blobs / name).rename(tmp_path / name)
        (step / name).unlink()
        (step / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
            Checkpoint.open(step)


def test_a_checkpoint_may_be_copied_under_another_name_and_linked_as_a_whole(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    os.symlink(folder, tmp_path / "link")
    for path in (tmp_path / "mine", tmp_path / "link"):
        Checkpoint.open(path).verify()
    (tmp_path / "mine" / "NOTES").write_text("files beside the listed ones are nobody's business")
    Checkpoint.open(tmp_path / "mine").verify()


def test_a_checkpoint_of_another_name_of_step_is_refused(folder: Path) -> None:
    moved = folder.rename(folder.with_name("step-000009"))
    with pytest.raises(CheckpointError, match="step=7 must be that of the folder's name"):
        Checkpoint.open(moved)
