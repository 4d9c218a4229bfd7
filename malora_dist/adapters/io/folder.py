"""Adapter folders: adapter_config.json, adapter_model.safetensors and a model card, in the layout of PEFT.

Whatever holds an adapter is read through `open_adapter`, one tensor at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from malora_dist.adapters.io.info import (
    CONFIG,
    WEIGHTS,
    AdapterInfo,
    AnyPath,
    adapter_config,
    file_key,
    file_shape,
    model_name,
    read_adapter_info,
)
from malora_dist.adapters.io.weights import check_factors, check_seal, weights_header
from malora_dist.checkpoint.detect import detect_kind
from malora_dist.checkpoint.layout import MANIFEST, pointed_at
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.shards import file_record
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.errors import CheckpointError, brief
from malora_dist.files import run_files
from malora_dist.files.atomic import share_file
from malora_dist.files.durable import write_text
from malora_dist.files.folder import file_in, new_folder
from malora_dist.files.tensor_file import TensorPlace, read_elements, write_tensors

__all__ = ["CONFIG", "WEIGHTS", "AdapterInfo", "AdapterTensors", "fill_adapter_folder", "open_adapter"]
__all__ += ["read_adapter_info", "save_adapter", "write_adapter_folder"]


@dataclass(frozen=True, kw_only=True)
class AdapterTensors:
    """The tensors of an adapter by their name in the model, `<layer>.<factor>`, read one at a time.

    `shapes` and what `read` returns have the experts on dim 0; the dtype is that of the file. `path` is what they are
    read from, `checkpoint` the checkpoint if it is one. `read` raises CheckpointError for a damaged file and for
    numbers that are not finite.
    """

    info: AdapterInfo
    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    checkpoint: Checkpoint | None = None

    def layers(self) -> dict[str, list[str]]:
        """Return the factors of every layer, in the order of the file."""
        factors: dict[str, list[str]] = {}
        for name in self.shapes:
            layer, _, factor = name.rpartition(".")
            factors.setdefault(layer, []).append(factor)
        return factors

    def read_layer(self, layer: str) -> dict[str, Tensor]:
        """Read all factors of one layer, fp32 unless they are wider."""
        tensors = {factor: self.read(f"{layer}.{factor}") for factor in self.layers()[layer]}
        return {
            factor: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for factor, tensor in tensors.items()
        }


def open_adapter(path: AnyPath) -> AdapterTensors:
    """Open the adapter of an adapter folder, of a checkpoint, or of a run: its `adapter`, else its newest checkpoint.

    Raises CheckpointError if there is none, if a file is damaged or outside the folder, and if a layer lacks a tensor
    of its method, has one too many or one of another shape.
    """
    folder = _find(pointed_at(Path(path)))
    if (folder / MANIFEST).is_file():
        return _open_checkpoint(folder)
    file_in(folder, CONFIG)
    tensors = open_weights(folder, read_adapter_info(folder))
    check_seal(folder)
    return tensors


def _find(path: Path) -> Path:
    """Return the folder with adapter_config.json that `path` is or, as a run, holds."""
    if not (path / CONFIG).exists():
        if (path / run_files.ADAPTER / CONFIG).exists():
            return path / run_files.ADAPTER
        checkpoints = path / run_files.CHECKPOINTS
        latest = CheckpointStore(checkpoints).latest() if checkpoints.is_dir() else None
        if latest is not None:
            return latest
        if not (path / MANIFEST).exists():
            raise CheckpointError(
                f"{path} is not an adapter folder, a checkpoint or a run (it has no {CONFIG}): {detect_kind(path)}"
            )
    return path


def open_weights(folder: Path, info: AdapterInfo) -> AdapterTensors:
    """Open the tensors of an adapter folder whose config says `info`, also one of PEFT's. Raises as `open_adapter`."""
    places, shapes = dict[str, TensorPlace](), dict[str, tuple[int, ...]]()
    path = folder / WEIGHTS
    for key, place in weights_header(folder).items():
        name, alone = model_name(key)
        if name in places:
            raise CheckpointError(f"{path}: {brief(key)} is {brief(name)}, which another tensor of the file is too")
        places[name], shapes[name] = place, (1, *place.shape) if alone else place.shape
    tensors = AdapterTensors(info=info, path=path, shapes=shapes, read=partial(_read, path, places, shapes))
    check_factors(tensors.path, tensors.info.spec, shapes)
    return tensors


def _read(path: Path, places: Mapping[str, TensorPlace], shapes: Mapping[str, tuple[int, ...]], name: str) -> Tensor:
    try:
        tensor = read_elements(path, places[name], 0, places[name].numel).view(shapes[name])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name} holds numbers that are not finite")
    return tensor


def _open_checkpoint(folder: Path) -> AdapterTensors:
    file_in(folder, CONFIG)
    checkpoint = Checkpoint.open(folder)
    files = checkpoint.manifest.tensors["adapter"]
    checkpoint.verify([CONFIG, *dict.fromkeys(files.values())])
    tensors = AdapterTensors(
        info=read_adapter_info(folder),
        path=folder,
        shapes={name: checkpoint.shape("adapter", name) for name in files},
        read=partial(checkpoint.read, "adapter"),
        checkpoint=checkpoint,
    )
    check_factors(tensors.path, tensors.info.spec, tensors.shapes)
    return tensors


def save_adapter(folder: AnyPath, info: AdapterInfo, state: Mapping[str, Tensor], card: str) -> None:
    """Write the folder so that each file is either whole or absent; a former adapter there is replaced.

    A kill leaves the former adapter, the new one, or a folder without a config, which is not an adapter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        file_key(info, name): tensor.reshape(file_shape(info, tuple(tensor.shape))).contiguous()
        for name, tensor in state.items()
    }
    partial_file = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial_file, metadata={"format": "pt"})
    share_file(partial_file)
    seal = file_record(partial_file).sha256
    # The former config says the checksum of the former weights.
    (folder / CONFIG).unlink(missing_ok=True)
    partial_file.replace(folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(adapter_config(info, seal), indent=2) + "\n")
    write_text(folder / "README.md", card)


def write_adapter_folder(
    folder: AnyPath, info: AdapterInfo, shapes: Mapping[str, tuple[int, ...]], values: Iterable[Tensor], card: str
) -> None:
    """Write a new adapter folder, whole or not at all, of fp32 tensors that are asked for one at a time.

    `shapes` has the experts on dim 0 and names `<layer>.<factor>`; `values` come in its order. Raises CheckpointError
    if `folder` exists or cannot be written.
    """
    with new_folder(Path(folder)) as partial_folder:
        fill_adapter_folder(partial_folder, info, shapes, values, card)


def fill_adapter_folder(
    folder: Path, info: AdapterInfo, shapes: Mapping[str, tuple[int, ...]], values: Iterable[Tensor], card: str
) -> None:
    """Write the files of `write_adapter_folder` into an existing empty folder, for callers who rename it themselves."""
    stored = {file_key(info, name): (torch.float32, file_shape(info, shape)) for name, shape in shapes.items()}
    digest = hashlib.sha256()
    write_tensors(folder / WEIGHTS, stored, _in_file_form(info, values), observe=digest.update)
    write_text(folder / CONFIG, json.dumps(adapter_config(info, digest.hexdigest()), indent=2) + "\n")
    write_text(folder / "README.md", card)


def _in_file_form(info: AdapterInfo, values: Iterable[Tensor]) -> Iterator[Tensor]:
    for value in values:
        yield value.float().reshape(file_shape(info, tuple(value.shape)))
