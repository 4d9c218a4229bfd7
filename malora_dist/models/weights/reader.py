"""Single tensors, and parts of them, from the safetensors files of a folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from malora_dist.errors import ConfigError, short
from malora_dist.files.json_text import parse_json
from malora_dist.files.tensor_file import DTYPES, TensorPlace, read_elements, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KINDS = (".safetensors", ".safetensors.index.json")
# The key of config.json by which transformers reads a file of another name.
NAMED = "transformers_weights"


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a folder's tensors, and the index that says which holds what, where there is one."""

    names: tuple[str, ...]
    index: str | None = None
    file_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def listed(self) -> list[str]:
        """The index and the files, sorted: all that a folder's weights are told apart by."""
        return [*([] if self.index is None else [self.index]), *sorted(self.names)]


def weight_files(folder: Path) -> WeightFiles:
    """Return the files that transformers reads: what config.json names, else one file, else those of the index.

    One file goes before an index: a merged model may have been copied into the folder of a sharded one.
    Raises ConfigError if the folder has no safetensors, or an index that is none.
    """
    named = _named_in_config(folder)
    for name in (SINGLE, INDEX) if named is None else (named,):
        if (folder / name).is_file():
            return _indexed(folder, name) if name.endswith(".json") else WeightFiles((name,))
    wanted = f"neither {SINGLE} nor {INDEX}" if named is None else f"no {named}, which {NAMED} of its config.json is"
    raise ConfigError(f"{folder} holds {wanted}; other weight formats are not read")


def _named_in_config(folder: Path) -> str | None:
    try:
        content = parse_json((folder / "config.json").read_bytes(), lenient=True)
    except (OSError, ValueError):
        return None  # said where the configuration is read
    named = content.get(NAMED) if isinstance(content, dict) else None
    if named is None:
        return None
    if not isinstance(named, str) or Path(named).name != named or not named.endswith(KINDS):
        raise ConfigError(f"{folder / 'config.json'}: {NAMED}={short(named)} must be a safetensors file of its folder")
    return named


def _indexed(folder: Path, index: str) -> WeightFiles:
    with readable(folder / index):
        file_of = parse_json((folder / index).read_bytes())["weight_map"]
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise ValueError("weight_map must give a file's name for each tensor's")
        for file in dict.fromkeys(file_of.values()):
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"weight_map names {short(file)}, which is no file of its folder")
        return WeightFiles(tuple(dict.fromkeys(file_of.values())), index, file_of)


class TensorReader:
    """Reads from a model folder, and counts the bytes it reads.

    Raises ConfigError if the folder has no safetensors, for a damaged file, or for a tensor that no file holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._headers: dict[str, dict[str, TensorPlace]] = {}
        self._other_dtypes: dict[str, str] = {}
        files = weight_files(folder)
        self._file_of = files.file_of if files.index is not None else self._of_one_file(files.names[0])

    def holds(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file_of)

    def place(self, names: Sequence[str]) -> TensorPlace:
        """Return dtype and shape of the tensor that `read` reads."""
        return self._find(names)[1]

    def read(self, names: Sequence[str]) -> Tensor:
        """Read the tensor stored under the first of `names` that exists (tied weights have several)."""
        place = self.place(names)
        return self.read_part(names, 0, place.numel).view(place.shape)

    def read_part(self, names: Sequence[str], start: int, stop: int) -> Tensor:
        """Read elements [start, stop) of the flat tensor, and no other byte of it."""
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

    def _of_one_file(self, file: str) -> dict[str, str]:
        return dict.fromkeys([*self._header(file), *self._other_dtypes], file)

    def _header(self, file: str) -> dict[str, TensorPlace]:
        if file not in self._headers:
            path = self.folder / file
            with readable(path):
                self._headers[file] = read_header(path, self._other_dtypes)
                self.bytes_read += min((place.start for place in self._headers[file].values()), default=0)
        return self._headers[file]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise a ConfigError that names the file if it cannot be read within the block."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is missing or damaged: {error}") from error
