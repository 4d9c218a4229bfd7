"""The prepared base: all base tensors as a run keeps them, quantised once, in a folder that no run changes.

Its name holds a hash of all that its bytes depend on. Weight files are told apart without reading them whole
(`fingerprint.file_identity`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.files.cache import build_once, default_cache_dir
from malora_dist.files.json_text import parse_json
from malora_dist.files.tensor_file import write_tensors
from malora_dist.models.weights.base_tensor import BaseTensor, Weights
from malora_dist.models.weights.fingerprint import file_identity
from malora_dist.models.weights.reader import INDEX, TensorReader, readable, weight_files
from malora_dist.models.weights.stored_names import StoredAs
from malora_dist.ops.nf4 import QUANTIZER
from malora_dist.ops.nf4_layout import BLOCK, SCALE_BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
UNTIED = "untied"
FILE_BYTES = 4 * 2**30


def prepared_folder(
    model: Path, *, dtype: torch.dtype, double_quant: bool, cache_dir: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return where the prepared 4-bit base of a model folder is or would be, and all that its bytes depend on.

    Raises ConfigError if the model folder's files cannot be read.
    """
    weights = {name: _identity_of(model / name) for name in weight_files(model).listed}
    with readable(model / "config.json"):
        config = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    identity = {
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "config": config,
        "dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "blocks": [BLOCK, SCALE_BLOCK],
        "quantizer": QUANTIZER,
        # Of the one is the 8-bit code of scales, and module names of the other are those of the tensors.
        "versions": {name: version(name) for name in ("bitsandbytes", "transformers")},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = (cache_dir or default_cache_dir()) / "base" / f"{_readable_name(model)}-nf4-{digest[:24]}"
    return folder, identity


def _identity_of(path: Path) -> list[Any]:
    with readable(path):
        return file_identity(path)


def _readable_name(model: Path) -> str:
    """Return the model's name; a snapshot in the hub's cache has its commit for a folder name."""
    model = model.resolve()
    return model.parents[1].name.split("--")[-1] if model.parent.name == "snapshots" else model.name


def write_prepared(
    folder: Path,
    identity: dict[str, Any],
    tensors: Iterable[BaseTensor],
    weights: Weights,
    *,
    untied: Sequence[str] = (),
    file_bytes: int = FILE_BYTES,
    advance: Callable[[], None] = lambda: None,
) -> bool:
    """Write the base's tensors, one in memory at a time, unless the folder is there; return whether it was written.

    `untied` are the tied parameters that have a tensor of their own. `advance` is called after each tensor.
    Raises ConfigError if a weight is missing or the cache cannot be written.
    """

    def build(partial: Path) -> None:
        file_of: dict[str, str] = {}
        for number, group in enumerate(_groups(tensors, file_bytes), start=1):
            file = f"weights-{number:05d}.safetensors"
            shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in group}
            write_tensors(partial / file, shapes, _values(group, weights, advance))
            file_of.update(dict.fromkeys(shapes, file))
        (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}, indent=1))
        (partial / MANIFEST).write_text(json.dumps(identity | {UNTIED: list(untied)}, indent=1))

    try:
        return build_once(folder, build)
    except OSError as error:
        raise ConfigError(f"MALORA_CACHE: {folder.parent} cannot be written: {error}") from error


def _values(group: list[BaseTensor], weights: Weights, advance: Callable[[], None]) -> Iterator[Tensor]:
    for tensor in group:
        yield weights.read(tensor)
        advance()


def _groups(tensors: Iterable[BaseTensor], file_bytes: int) -> Iterator[list[BaseTensor]]:
    group: list[BaseTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.num_bytes > file_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.num_bytes
    yield group


class PreparedWeights:
    """Reads a prepared base. Raises ConfigError, saying how to make it anew, if it does not hold what is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = TensorReader(folder)

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def stored_names(self, model: "PreTrainedModel") -> dict[str, StoredAs]:
        return {}

    def untied_names(self, model: "PreTrainedModel") -> list[str]:
        with readable(self.folder / MANIFEST):
            untied: list[str] = parse_json((self.folder / MANIFEST).read_bytes())[UNTIED]
        return untied

    def read(self, tensor: BaseTensor) -> Tensor:
        return self.read_part(tensor, 0, tensor.numel).view(tensor.shape)

    def read_part(self, tensor: BaseTensor, start: int, stop: int) -> Tensor:
        place = self.reader.place([tensor.name])
        if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            raise ConfigError(
                f"{self.folder}: {tensor.name} is {place.dtype} {place.shape} instead of {tensor.dtype} "
                f"{tensor.shape}; remove that folder and run `malora prepare` again"
            )
        return self.reader.read_part([tensor.name], start, stop)
