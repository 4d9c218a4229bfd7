"""A finished checkpoint, opened to read single tensors and ranges of them."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from malora_dist.checkpoint.detect import detect_kind
from malora_dist.checkpoint.layout import MANIFEST, Manifest, pointed_at, step_of
from malora_dist.checkpoint.shards import file_record, require_finite
from malora_dist.errors import CheckpointError
from malora_dist.files.durable import reading
from malora_dist.files.folder import is_cached
from malora_dist.files.tensor_file import TensorPlace, read_elements, read_header
from malora_dist.optimizers.adamw import ADAMW
from malora_dist.optimizers.registry import spec_of_kind
from malora_dist.optimizers.spec import OptimizerSpec

DTYPES_OF = {"adapter": (torch.float32,), "optimizer": (torch.float32,), "rng": (torch.uint8, torch.int64)}


class Checkpoint:
    """The tensors of a finished checkpoint by kind (`adapter`, `optimizer`, `rng`) and name; made by `open`.

    Attributes:
        folder: the checkpoint's folder.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, places: dict[str, dict[str, TensorPlace]]) -> None:
        self.folder, self.manifest = folder, manifest
        self._places = places

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Checkpoint":
        """Read the manifest and the headers of all shards, and check that they agree; no tensor is read.

        Raises CheckpointError if this is no checkpoint, is of a newer format, or if a file is missing, cut short, a
        link (other than the hub's cache makes) or holds other tensors than the manifest says. Damage inside tensors is
        for `verify` to find. A file `latest` or `best` stands for the checkpoint that it names.
        """
        folder = Path(folder)
        with reading(folder):
            folder = pointed_at(folder)
            if not (folder / MANIFEST).is_file():
                raise CheckpointError(f"{folder} is not a checkpoint, it has no {MANIFEST}: {detect_kind(folder)}")
        manifest = Manifest.read(folder)
        if step_of(folder.name) not in (None, manifest.step):
            raise CheckpointError(f"{folder / MANIFEST}: step={manifest.step} must be that of the folder's name")
        check_files(folder, manifest)
        headers = {name: _header(folder / name) for name in manifest.files if name.endswith(".safetensors")}
        _check_listing(folder, manifest, headers)
        places = {
            kind: {name: headers[file][name] for name, file in file_of.items()}
            for kind, file_of in manifest.tensors.items()
        }
        checkpoint = cls(folder, manifest, places)
        checkpoint._check_tensors()
        return checkpoint

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Read these files (all of the manifest's by default) and compare their SHA-256.

        Raises CheckpointError that names the file and both checksums.
        """
        for name in self.manifest.files if files is None else files:
            path = self.folder / name
            if name not in self.manifest.files:
                raise CheckpointError(f"{path} is not in the manifest of this checkpoint")
            found = file_record(path)
            expected = self.manifest.files[name]
            if found != expected:
                raise CheckpointError(
                    f"{path} is damaged: its SHA-256 is {found.sha256} ({found.bytes} bytes), "
                    f"the manifest says {expected.sha256} ({expected.bytes} bytes)"
                )

    def names(self, kind: str) -> list[str]:
        """Return the names of all tensors of a kind, in the order of the manifest."""
        return list(self._places[kind])

    def place(self, kind: str, name: str) -> TensorPlace:
        """Return dtype, shape and position in its file of a tensor.

        Raises CheckpointError if there is none of this name.
        """
        if name not in self._places[kind]:
            raise CheckpointError(f"{self.folder} holds no {kind} tensor {name}")
        return self._places[kind][name]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises CheckpointError if there is none of this name."""
        return self.place(kind, name).shape

    def read(self, kind: str, name: str) -> Tensor:
        """Read a whole tensor. Raises CheckpointError if there is none, if it cannot be read or is not finite."""
        place = self.place(kind, name)
        return self.read_elements(kind, name, 0, place.numel).view(place.shape)

    def read_elements(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Read elements [start, stop) of the flat tensor, 1-D, and no other byte of it. Raises as `read` does."""
        place = self.place(kind, name)
        assert 0 <= start <= stop <= place.numel
        path = self.folder / self.manifest.tensors[kind][name]
        try:
            with reading(path):
                elements = read_elements(path, place, start, stop)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        require_finite(path, name, elements)
        return elements

    def _check_tensors(self) -> None:
        """Check the dtypes of the tensors, and which of them are there.

        Dtypes are those of the format, and an adapter tensor has all tensors of its optimizer's state, or none.
        """
        for kind, places in self._places.items():
            for name, place in places.items():
                if place.dtype not in DTYPES_OF[kind]:
                    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES_OF[kind])
                    self._refuse(kind, name, f"has dtype {str(place.dtype).removeprefix('torch.')}, must be {wanted}")
        spec = spec_of_kind(optimizer_kind(self.manifest))
        if spec is not None:
            self._check_states(spec)

    def _check_states(self, spec: OptimizerSpec) -> None:
        for name, place in self._places["optimizer"].items():
            state, _, parameter = name.partition(".")
            adapter = self._places["adapter"].get(parameter)
            shapes = {} if adapter is None else spec.layout.shapes(adapter.shape)
            if adapter is None or state not in shapes:
                known = " or ".join(spec.layout.shapes((1, 1) if adapter is None else adapter.shape))
                self._refuse("optimizer", name, f"must be {known} of an adapter tensor")
            elif place.shape != shapes[state]:
                self._refuse("optimizer", name, f"has shape {place.shape}, its adapter tensor {adapter.shape}")
            for other in shapes:
                if f"{other}.{parameter}" not in self._places["optimizer"]:
                    self._refuse("optimizer", name, f"comes without {other}.{parameter}")

    def _refuse(self, kind: str, name: str, reason: str) -> None:
        raise CheckpointError(f"{self.folder / self.manifest.tensors[kind][name]}: {name} {reason}")


def optimizer_kind(manifest: Manifest) -> object:
    """Return what the manifest calls the optimizer; AdamW where it names none."""
    saved = manifest.state.get("optimizer")
    return saved.get("kind", ADAMW.kind) if isinstance(saved, dict) else ADAMW.kind


def check_files(folder: Path, manifest: Manifest, if_missing: str = "") -> None:
    """Raise CheckpointError unless every file of the manifest is there, a plain file and of its size.

    A file of the hub's cache counts as plain. `if_missing` is added to the message for a missing file.
    """
    for name, record in manifest.files.items():
        path = folder / name
        try:
            status = os.stat(path) if is_cached(path) else os.lstat(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing, the manifest lists it{if_missing}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
            raise CheckpointError(f"{path} is {what}; a checkpoint's files must lie in its folder")
        if status.st_size != record.bytes:
            raise CheckpointError(f"{path} has {status.st_size} bytes, the manifest says {record.bytes}")


def _header(path: Path) -> dict[str, TensorPlace]:
    try:
        with reading(path):
            return read_header(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _check_listing(folder: Path, manifest: Manifest, headers: dict[str, dict[str, TensorPlace]]) -> None:
    """Check that each file holds exactly the tensors that the manifest lists for it, all of one kind."""
    listed: dict[str, dict[str, str]] = {file: {} for file in headers}
    for kind, file_of in manifest.tensors.items():
        for name, file in file_of.items():
            if name not in headers.get(file, {}):
                raise CheckpointError(f"{folder / file} holds no {name}, the manifest lists it there")
            if set(listed[file].values()) - {kind}:
                raise CheckpointError(f"{folder / file} is listed for two kinds of tensors; a file must be of one")
            listed[file][name] = kind
    for file, header in headers.items():
        for name in header.keys() - listed[file].keys():
            raise CheckpointError(f"{folder / file} holds {name}, which the manifest does not list")
