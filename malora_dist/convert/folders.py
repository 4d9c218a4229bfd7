"""Kinds that keep every number: `adapter` and `checkpoint`."""

import torch

from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import AdapterTensors, fill_adapter_folder, open_adapter
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.reshard import SHARDED, reshard
from malora_dist.convert.job import Job
from malora_dist.convert.verify import verify_routed
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.folder import file_in


def to_adapter(job: Job) -> None:
    """Write the adapter of SRC as an adapter folder: the same numbers, fp32."""
    adapter = job.open_adapter()
    values = (adapter.read(name) for name in adapter.shapes)
    fill_adapter_folder(job.folder, adapter.info, adapter.shapes, values, _card(job, adapter))
    if job.options.verify:
        verify_routed(job, adapter, open_adapter(job.folder))


def _card(job: Job, adapter: AdapterTensors) -> str:
    """Return the model card of the source, which has the adapter's results; else a new one."""
    former = adapter.path.parent / "README.md"
    if adapter.checkpoint is None and former.is_file():
        return file_in(former.parent, former.name).read_text(encoding="utf-8", errors="replace")
    return model_card(adapter.info, job.task_names(), {})


def to_checkpoint(job: Job) -> None:
    """Write the checkpoint SRC with --shards files for each kind of tensor. --verify compares every tensor's bytes."""
    if job.options.shards is None:
        raise ConfigError("--to checkpoint needs --shards N, the number of files for each kind of tensor")
    written = reshard(job.source, job.folder / job.target.name, job.options.shards)
    if job.options.verify:
        _verify_checkpoint(job, Checkpoint.open(job.source), Checkpoint.open(written))
    for path in written.iterdir():
        path.rename(job.folder / path.name)
    written.rmdir()


def _verify_checkpoint(job: Job, source: Checkpoint, result: Checkpoint) -> None:
    result.verify()
    for kind in SHARDED:
        for name in source.names(kind):
            if not torch.equal(source.read(kind, name), result.read(kind, name)):
                raise CheckpointError(f"verification failed: {kind} tensor {name} differs from that of {source.folder}")
    count = sum(len(source.names(kind)) for kind in SHARDED)
    job.log(f"verified: {count} tensors are equal bit for bit, so max |d weight| and max |d logits| are 0")
