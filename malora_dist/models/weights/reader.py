"""Single tensors, and parts of them, from the safetensors files of a folder."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.files.tensor_file import DTYPES, TensorPlace, read_elements, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> dict[str, str] | None:
    """File of each tensor by the folder's index, None if one file holds all.

    Raises ConfigError if the folder has no safetensors.
    """
    if (folder / INDEX).is_file():
        with readable(folder / INDEX):
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return weight_map
    if (folder / SINGLE).is_file():
        return None
    raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}; other weight formats are not read")


class TensorReader:
    """Reads from a model folder, and counts the bytes it reads.

    Raises ConfigError if the folder has no safetensors, for a damaged file, or for a tensor that no file holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._headers: dict[str, dict[str, TensorPlace]] = {}
        self._other_dtypes: dict[str, str] = {}
        self._file_of = weight_files(folder) or dict.fromkeys([*self._header(SINGLE), *self._other_dtypes], SINGLE)

    def holds(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def place(self, names: Sequence[str]) -> TensorPlace:
        """Dtype and shape of the tensor that `read` reads."""
        return self._find(names)[1]

    def read(self, names: Sequence[str]) -> Tensor:
        """The tensor stored under the first of `names` that exists (tied weights have several)."""
        place = self.place(names)
        return self.read_part(names, 0, place.numel).view(place.shape)

    def read_part(self, names: Sequence[str], start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat tensor; no other byte of it is read."""
        path, place = self._find(names)
        assert 0 <= start <= stop <= math.prod(place.shape)
        with readable(path):
            part = read_elements(path, place, start, stop)
        self.bytes_read += part.numel() * part.element_size()
        return part

    def _find(self, names: Sequence[str]) -> tuple[Path, TensorPlace]:
        for name in names:
            if name in self._file_of:
                file = self._file_of[name]
                header = self._header(file)
                if name in self._other_dtypes:
                    raise ConfigError(
                        f"{self.folder / file}: {name} has dtype {self._other_dtypes[name]}; those read are "
                        f"{', '.join(DTYPES)}"
                    )
                if name not in header:
                    raise ConfigError(f"{self.folder / file} is missing or damaged: it holds no {name}")
                return self.folder / file, header[name]
        raise ConfigError(
            f"{self.folder} holds no weight named {' or '.join(names)}: do config and weights belong together?"
        )

    def _header(self, file: str) -> dict[str, TensorPlace]:
        if file not in self._headers:
            path = self.folder / file
            with readable(path):
                self._headers[file] = read_header(path, self._other_dtypes)
                self.bytes_read += min((place.start for place in self._headers[file].values()), default=0)
        return self._headers[file]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read, with a ConfigError, which it is."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is missing or damaged: {error}") from error
