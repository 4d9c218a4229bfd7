"""A finished checkpoint with another number of shard files.

Names are global and tensors whole, so a checkpoint serves every number of processes, `ep_size` and ZeRO stage as it is;
only the number of files that a reader or a file system likes may differ.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from malora_dist.checkpoint.layout import FileRecord, Manifest, shard_name, step_of
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.shards import plan_shards, stream_shard
from malora_dist.checkpoint.store import complete
from malora_dist.errors import CheckpointError
from malora_dist.files.atomic import share_file
from malora_dist.files.durable import writing
from malora_dist.files.folder import new_folder

SHARDED = ("adapter", "optimizer")


def reshard(source: str | os.PathLike[str], target: str | os.PathLike[str], shards: int) -> Path:
    """Write the checkpoint `source` to `target` with `shards` files for the adapter and as many for the optimizer.

    A kind of fewer tensors gets as many files as it has tensors. One tensor is in memory at a time. `target` appears
    whole or not at all. Raises CheckpointError if `target` exists, `source` is damaged, or on a full disk.
    """
    target = Path(target)
    if shards < 1:
        raise CheckpointError(f"shards={shards} must be at least 1")
    checkpoint = Checkpoint.open(source)
    step = checkpoint.manifest.step
    if step_of(target.name) not in (None, step):
        raise CheckpointError(f"{target}: the checkpoint is of step {step}, it must not have another step's name")
    with new_folder(target) as partial:
        checkpoint.verify()
        complete(partial, _write(checkpoint, partial, shards))
    return target


def _write(checkpoint: Checkpoint, partial: Path, shards: int) -> Manifest:
    manifest = checkpoint.manifest
    files: dict[str, FileRecord] = {}
    tensors = dict(manifest.tensors)
    for kind in SHARDED:
        tensors[kind] = {}
        for file, names in _plan(checkpoint, kind, shards).items():
            places = {name: checkpoint.place(kind, name) for name in names}
            shapes = {name: (place.dtype, place.shape) for name, place in places.items()}
            files[file] = stream_shard(partial / file, shapes, _values(checkpoint, kind, names))
            tensors[kind] |= dict.fromkeys(names, file)
        tensors[kind] = {name: tensors[kind][name] for name in manifest.tensors[kind]}
    replaced = {file for kind in SHARDED for file in manifest.tensors[kind].values()}
    for file in [file for file in manifest.files if file not in replaced]:
        with writing(partial / file):
            shutil.copyfile(checkpoint.folder / file, partial / file)
            share_file(partial / file)
        files[file] = manifest.files[file]
    return replace(manifest, files=files, tensors=tensors)


def _plan(checkpoint: Checkpoint, kind: str, shards: int) -> dict[str, list[str]]:
    sizes = {}
    for name in checkpoint.names(kind):
        place = checkpoint.place(kind, name)
        sizes[name] = place.end - place.start
    groups = [group for group in plan_shards(sizes, shards, 1) if group]
    return {shard_name(kind, number, len(groups)): group for number, group in enumerate(groups, start=1)}


def _values(checkpoint: Checkpoint, kind: str, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        yield checkpoint.read(kind, name)
