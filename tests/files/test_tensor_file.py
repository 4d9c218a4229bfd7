"""Files we write are safetensors to the library, byte for byte what it would hold."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from malora_dist.files.tensor_file import DTYPES, read_elements, read_header, write_tensors


def test_other_dtypes_can_be_set_apart(tmp_path: Path) -> None:
    header = json.dumps({"a": ENTRY, "b": {"dtype": "F4", "shape": [2], "data_offsets": [24, 25]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + bytes(25))
    others: dict[str, str] = {}
    assert list(read_header(tmp_path / "file", others)) == ["a"] and others == {"b": "F4"}
    with pytest.raises(ValueError, match="b has dtype F4"):
        read_header(tmp_path / "file")


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{i}": torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate([(3, 5), (1,), (0, 4), ()])
    }
    path = tmp_path / "file.safetensors"
    asked: list[str] = []
    values = (asked.append(name) or tensor for name, tensor in tensors.items())  # type: ignore[func-returns-value]
    seen = bytearray()
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(path, shapes, values, observe=seen.extend)
    assert seen == path.read_bytes()
    assert asked == list(tensors)
    theirs, places = load_file(path), read_header(path)
    assert theirs.keys() == places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        with torch.device("meta"):  # a default device is for what a model is built of, not for what is read
            ours = read_elements(path, places[name], 0, tensor.numel()).view(tensor.shape)
        assert ours.dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(ours, tensor) and torch.equal(theirs[name], tensor)
    with pytest.raises(FileExistsError):
        write_tensors(path, {}, [])


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DAMAGED: dict[str, tuple[Any, str]] = {
    "a list": ([ENTRY], "not a JSON object"),
    "no entry": ({"a": 3}, "a has no dtype"),
    "no dtype": ({"a": {"shape": [2, 3], "data_offsets": [0, 24]}}, "a has no dtype, shape and data_offsets"),
    "three offsets": ({"a": ENTRY | {"data_offsets": [0, 24, 24]}}, "a has no dtype, shape and data_offsets"),
    "offsets as text": ({"a": ENTRY | {"data_offsets": ["0", "24"]}}, "a has no dtype, shape and data_offsets"),
    "dtype as list": ({"a": ENTRY | {"dtype": ["F32"]}}, "a has no dtype, shape and data_offsets"),
    "unknown dtype": ({"a": ENTRY | {"dtype": "F33"}}, "a has dtype F33"),
    "size as text": ({"a": ENTRY | {"shape": [2, "3"]}}, "must be integers"),
    "negative sizes": ({"a": ENTRY | {"shape": [-2, -3]}}, "must be integers"),
    "before the data": ({"a": ENTRY | {"data_offsets": [-24, 0]}}, "must be integers"),
    "other size": ({"a": ENTRY | {"shape": [2, 4]}}, "another number of bytes"),
    "beyond the end": ({"a": ENTRY | {"data_offsets": [8, 32]}}, "the file ends after"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_a_value_error(tmp_path: Path, name: str) -> None:
    header, words = DAMAGED[name]
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(ValueError, match=words):
        read_header(tmp_path / "file")


def test_a_file_without_a_whole_header_is_a_value_error(tmp_path: Path) -> None:
    for content in (b"", b"1234", struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 2) + b"{\xff"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError):
            read_header(tmp_path / "file")
