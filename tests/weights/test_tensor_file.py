"""Files we write are safetensors to the library, byte for byte what it would hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from malora_dist.weights.tensor_file import DTYPES, read_elements, read_header, write_tensors


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{i}": torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate([(3, 5), (1,), (0, 4), ()])
    }
    path = tmp_path / "file.safetensors"
    asked: list[str] = []
    values = (asked.append(name) or tensor for name, tensor in tensors.items())  # type: ignore[func-returns-value]
    write_tensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, values)
    assert asked == list(tensors)
    theirs, places = load_file(path), read_header(path)
    assert theirs.keys() == places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ours = read_elements(path, places[name], 0, tensor.numel()).view(tensor.shape)
        assert ours.dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(ours, tensor) and torch.equal(theirs[name], tensor)
    with pytest.raises(FileExistsError):
        write_tensors(path, {}, [])
