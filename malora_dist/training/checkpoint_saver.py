"""Saving an engine's state while it trains: snapshot to memory, write in a thread, complete on all together."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from malora_dist import __version__
from malora_dist.adapters.io.folder import AdapterInfo
from malora_dist.adapters.io.info import adapter_config
from malora_dist.checkpoint.layout import (
    ADAPTER_CONFIG,
    RNG_FILE,
    FileRecord,
    Manifest,
    checkpoint_name,
    shard_name,
)
from malora_dist.checkpoint.shards import file_record, plan_shards, write_shard
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.console.log import LOGGER
from malora_dist.distributed.optimizer_state import OptimizerState
from malora_dist.distributed.process_groups import World, gather_lists, max_over_control
from malora_dist.distributed.rank_errors import run_on_rank0, sharing_errors
from malora_dist.distributed.snapshot import Whole, snapshot
from malora_dist.files.durable import write_text
from malora_dist.tracking.metrics import BYTES, CHECKPOINT, KIND, SECONDS, STALL_SECONDS, STEP

# Largest state that one process writes alone; larger ones are sharded.
SHARD_BYTES = 512 * 2**20
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the manifests of all checkpoints of a run say alike."""

    config: dict[str, Any]
    base: dict[str, str | None]
    topology: dict[str, int]
    adapter: AdapterInfo


@dataclass(frozen=True)
class _Job:
    """A save in flight: `files` is this process's part of it, `tensors` the file of every tensor by kind."""

    step: int
    best: bool
    state: dict[str, Any]
    tensors: dict[str, dict[str, str]]
    files: Future[dict[str, FileRecord]]
    began: float
    gathered: float


class Saver:
    """Writes checkpoints of an engine into `folder`; every process calls every method alike.

    Each tensor is gathered on all and kept by one process, which writes it: no process ever holds all of a large
    state. With `asynchronous`, `save` returns once the tensors are in memory, and a thread writes them; there is never
    more than one such save. A checkpoint exists from `complete` on.
    """

    def __init__(
        self,
        tensors: list[Whole],
        state: OptimizerState,
        world: World,
        folder: Path,
        description: Description,
        *,
        save_total_limit: int | None = None,
        asynchronous: bool = True,
        shard_bytes: int = SHARD_BYTES,
        saved: Callable[[dict[str, Any]], None] = lambda record: None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to save into `folder`.

        Args:
            tensors: those of the adapter.
            state: the optimizer's state of them.
            world: all processes.
            folder: where the checkpoints are.
            description: what their manifests say alike.
            save_total_limit: how many are kept; None for all.
            asynchronous: whether `save` returns before the files are written.
            shard_bytes: see SHARD_BYTES.
            saved: takes a record of each finished checkpoint, on every process.
            poll: called again and again while `complete` waits for files.
        """
        self.tensors, self.state, self.world, self.description = tensors, state, world, description
        self.store = CheckpointStore(folder, save_total_limit)
        self.folder, self.asynchronous, self.saved, self.poll = folder, asynchronous, saved, poll
        self.shards = plan_shards({whole.name: whole.num_bytes for whole in tensors}, world.size, shard_bytes)
        writers = [number * world.size // len(self.shards) for number in range(len(self.shards))]
        self.mine = writers.index(world.rank) if world.rank in writers else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: _Job | None = None

    def save(self, step: int, state: Mapping[str, Any], random: Mapping[str, Tensor], *, best: bool = False) -> None:
        """Begin to save the state after `step` optimizer steps; a finished checkpoint of it is left as it is.

        Args:
            step: optimizer steps so far.
            state: that of the manifest, the same on all processes.
            random: the state of this process's generators.
            best: whether it is the best checkpoint so far.

        Raises:
            CheckpointError: on all processes, if this or the save before it cannot be written.
        """
        self.complete()
        began = time.monotonic()
        folder = run_on_rank0(lambda: self._begin(step, best), self.world)
        if folder is None:
            return
        files = self._gather(random)
        tensors = self._files_of_tensors(files)
        write = self._thread.submit(self._write, Path(folder), files)
        self._job = _Job(step, best, dict(state), tensors, write, began, time.monotonic())
        if not self.asynchronous:
            self.complete()

    def _begin(self, step: int, best: bool) -> str | None:
        if step not in self.store.steps():
            return str(self.store.begin(step))
        if best:
            self.store.mark_best(step)
        return None

    def point_at_best(self, step: int | None) -> None:
        """Mark this step's checkpoint as the best, if there is one: a killed process may have saved it and no more."""
        if step is not None:
            run_on_rank0(lambda: self.store.mark_best(step) if step in self.store.steps() else None, self.world)

    def _gather(self, random: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the files that this process writes, with their tensors."""
        mine = set() if self.mine is None else set(self.shards[self.mine])
        files: dict[str, dict[str, Tensor]] = {}
        for kind, name, tensor in snapshot(self.tensors, self.state, mine.__contains__):
            assert self.mine is not None
            files.setdefault(shard_name(kind, self.mine + 1, len(self.shards)), {})[name] = tensor
        states = gather_lists([dict(random)])
        if self.world.is_main:
            files[RNG_FILE] = {f"{rank}.{kind}": t for rank, own in enumerate(states) for kind, t in own.items()}
        return files

    @staticmethod
    def _files_of_tensors(files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, str]]:
        """Return the file of every tensor of all processes, by kind, which is how a file's name begins."""
        result: dict[str, dict[str, str]] = {"adapter": {}, "optimizer": {}, "rng": {}}
        for name, file in gather_lists([(name, file) for file, tensors in files.items() for name in tensors]):
            kind = next(kind for kind in result if file.startswith(kind))
            result[kind][name] = file
        return result

    def _write(self, folder: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, FileRecord]:
        """Write this process's files, in a thread beside training."""
        records = {file: write_shard(folder / file, tensors) for file, tensors in files.items()}
        if self.world.is_main:
            config = folder / ADAPTER_CONFIG
            write_text(config, json.dumps(adapter_config(self.description.adapter), indent=2) + "\n")
            records[ADAPTER_CONFIG] = file_record(config)
        return records

    def progress(self) -> tuple[bool, bool]:
        """Return whether this process is still writing, and whether it has failed to."""
        if self._job is None:
            return False, False
        done = self._job.files.done()
        return not done, done and self._job.files.exception() is not None

    def complete(self) -> None:
        """Wait until the save in flight is written, and make it a checkpoint. Raises on all what fails on one."""
        if self._job is None:
            return
        job, self._job = self._job, None
        waited = time.monotonic()
        # Nobody waits in a collective, which has a timeout, for as long as a disk takes.
        while max_over_control([int(not job.files.done())], self.world)[0]:
            self.poll()
            time.sleep(POLL_SECONDS)
        try:
            with sharing_errors(self.world):
                records = job.files.result()
            files = dict(gather_lists(list(records.items())))
            run_on_rank0(lambda: self._commit(job, files), self.world)
        except Exception:
            if self.world.is_main:
                self.store.discard(job.step)
            raise
        self._report(job, sum(record.bytes for record in files.values()), waited)

    def _commit(self, job: _Job, files: dict[str, FileRecord]) -> None:
        packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
        manifest = Manifest(
            malora_dist=__version__,
            **packages,
            step=job.step,
            topology=self.description.topology,
            config=self.description.config,
            base=self.description.base,
            state=job.state,
            files=files,
            tensors=job.tensors,
        )
        self.store.commit(job.step, manifest)
        if job.best:
            self.store.mark_best(job.step)

    def _report(self, job: _Job, size: int, waited: float) -> None:
        now = time.monotonic()
        stall = job.gathered - job.began + now - waited
        logging.getLogger(LOGGER).info(
            "saved %s, %.1f MiB in %.1f s, of which training waited %.2f s",
            self.folder / checkpoint_name(job.step),
            size / 2**20,
            now - job.began,
            stall,
        )
        self.saved(
            {
                KIND: CHECKPOINT,
                STEP: job.step,
                BYTES: size,
                SECONDS: now - job.began,
                STALL_SECONDS: stall,
            }
        )
