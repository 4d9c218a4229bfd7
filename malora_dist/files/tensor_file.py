"""safetensors files, written one tensor at a time and read by ranges of elements.

The library's own `save_file` wants all tensors of a file at once, and its slices are whole rows. Here memory stays at
one tensor, and only the bytes asked for leave the disk.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from malora_dist.errors import brief, short
from malora_dist.files.json_text import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's dtype and shape, and where in its file its bytes start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.start + self.numel * self.dtype.itemsize


def read_header(path: Path, others: dict[str, str] | None = None) -> dict[str, TensorPlace]:
    """Read the places of a file's tensors by name. Raises OSError, or ValueError if the file is damaged or cut short.

    A dtype that is not read is a ValueError too, unless `others` takes name and dtype of such tensors.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        prefix = file.read(LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == LENGTH_BYTES else size
        if LENGTH_BYTES + length > size:
            raise ValueError("the header is longer than the file")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    foreign = {name: entry["dtype"] for name, entry in header.items() if _is_of_other_dtype(entry)}
    if others is None:
        foreign = {}
    else:
        others |= foreign
    places = {name: _place(name, entry, LENGTH_BYTES + length) for name, entry in header.items() if name not in foreign}
    if any(place.end > size for place in places.values()):
        raise ValueError(f"the file ends after {size} bytes, before its last tensor does")
    _check_offsets(header, size - LENGTH_BYTES - length)
    return places


def _is_of_other_dtype(entry: object) -> bool:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    return isinstance(dtype, str) and dtype not in DTYPES


def _check_offsets(header: dict[str, object], size: int) -> None:
    """Raise ValueError unless the tensors lie one behind the other and fill the file, as the format requires."""
    offsets = [
        entry["data_offsets"] for entry in header.values() if isinstance(entry, dict) and "data_offsets" in entry
    ]
    places = [place for place in offsets if isinstance(place, list) and [type(end) for end in place] == [int, int]]
    end = 0
    for start, stop in sorted(places):
        if start != end or stop < start:
            raise ValueError(f"a tensor lies at bytes {start} to {stop}, the one before it ends at {end}")
        end = stop
    if len(places) == len(header) and end != size:
        raise ValueError(f"its tensors end after {end} bytes, the file has {size} for them")


def _place(name: str, entry: object, data_start: int) -> TensorPlace:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise ValueError(f"{brief(name)} has no dtype, shape and data_offsets in the header")
    if dtype not in DTYPES:
        raise ValueError(f"{brief(name)} has dtype {brief(dtype)}; those read are {', '.join(DTYPES)}")
    if start < 0 or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{brief(name)} has shape {short(shape)} from byte {start}; sizes must be integers from 0 on")
    place = TensorPlace(DTYPES[dtype], tuple(shape), data_start + start)
    if place.end != data_start + stop:
        raise ValueError(f"{brief(name)} has another number of bytes than its shape says")
    return place


def read_elements(path: Path, place: TensorPlace, start: int, stop: int) -> Tensor:
    """Read elements [start, stop) of the flat tensor, 1-D. Raises OSError or ValueError."""
    itemsize = place.dtype.itemsize
    raw = torch.empty((stop - start) * itemsize, dtype=torch.uint8, device="cpu")
    view = raw.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(place.start + start * itemsize)
        # One read may return less than was asked for, always above 2 GiB.
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError("the file ends before its last tensor does")
            view = view[count:]
    return raw.view(place.dtype)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterable[Tensor],
    *,
    observe: Callable[[bytes | memoryview], object] = lambda data: None,
) -> None:
    """Write a new file of named dtypes and shapes; `values` come in the same order and are asked for one at a time.

    `observe` is shown every byte in the order of the file, for a checksum.
    """

    def write(data: bytes | memoryview) -> None:
        file.write(data)
        observe(data)

    names_of = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names_of[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("xb") as file:
        write(struct.pack("<Q", len(text)) + text)
        for (name, expected), tensor in zip(shapes.items(), values, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == expected, name
            write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
