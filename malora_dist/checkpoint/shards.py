"""Shards: which writer writes which tensors, and a safetensors file that is hashed while it is written."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from malora_dist.checkpoint.layout import FileRecord
from malora_dist.errors import CheckpointError
from malora_dist.files.atomic import share_file
from malora_dist.files.durable import reading, writing
from malora_dist.files.tensor_file import write_tensors

Shape = tuple[torch.dtype, tuple[int, ...]]
READ_BYTES = 2**20


def plan_shards(sizes: Mapping[str, int], world_size: int, shard_bytes: int) -> list[list[str]]:
    """Split the tensors among the writers by their sizes in bytes, the same on every process.

    There are ceil(total / shard_bytes) writers, at most `world_size` and at most one a tensor: up to a total of
    `shard_bytes` one writer writes all. The largest tensors are given out first, each to the writer with the fewest
    bytes. Each writer's names keep the order of `sizes`. Only without tensors is a writer's list empty.
    """
    assert world_size >= 1 and shard_bytes >= 1
    writers = max(1, min(-(-sum(sizes.values()) // shard_bytes), world_size, len(sizes)))
    # Counting tensors too gives each writer one, even where sizes are 0.
    loads = [(0, 0, writer) for writer in range(writers)]
    writer_of: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        size, count, writer = loads[0]
        heapq.heapreplace(loads, (size + sizes[name], count + 1, writer))
        writer_of[name] = writer
    return [[name for name in sizes if writer_of[name] == writer] for writer in range(writers)]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a new safetensors file of these tensors, on disk when this returns.

    Raises CheckpointError if it exists, cannot be written, or if a float is NaN or infinite.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return stream_shard(path, shapes, tensors.values())


def stream_shard(path: Path, shapes: Mapping[str, Shape], values: Iterable[Tensor]) -> FileRecord:
    """Write a file as `write_shard` does, with one tensor in memory.

    `values` come in the order of `shapes` and are asked for one at a time.
    """
    digest = hashlib.sha256()
    with writing(path):
        write_tensors(path, shapes, _finite(path, shapes, values), observe=digest.update)
        share_file(path)
        return FileRecord(path.stat().st_size, digest.hexdigest())


def file_record(path: Path) -> FileRecord:
    """Compute the size and SHA-256 of a file, read in pieces. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    with reading(path), path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return FileRecord(size, digest.hexdigest())


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError, naming file and tensor, if an element is NaN or infinite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{path}: {name} has {count} of {tensor.numel()} elements that are NaN or infinite")


def _finite(path: Path, names: Iterable[str], values: Iterable[Tensor]) -> Iterator[Tensor]:
    for name, tensor in zip(names, values, strict=True):
        require_finite(path, name, tensor)
        yield tensor
