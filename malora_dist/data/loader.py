"""Micro-batches for one rank, cut from a global order of samples that no rank and no batch size changes."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from malora_dist.data.encode import Sample
from malora_dist.data.mixture import EpochCounts, Indices, epoch_order, mixture_shares
from malora_dist.data.packed_row import PackedRow, cumulative_lengths
from malora_dist.errors import CheckpointError, DataError, TopologyError


@dataclass(frozen=True, eq=False)
class MicroBatch(PackedRow):
    """B samples; T, N and S = B as in `PackedRow`."""

    target_sample: Tensor  # (N,) which sample, 0..B-1, a target belongs to
    sample_ids: Tensor  # (B,) global sample ids
    task_ids: Tensor  # (B,)
    target_counts: Tensor  # (B,) targets of each sample
    tasks_and_targets: tuple[tuple[int, int], ...]  # task and number of targets of each sample, on the host
    token_counts: tuple[int, ...]  # tokens of each sample, on the host


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pack samples into one row; the targets of a sample are its ids from `prompt_length` (>= 1) on."""
    lengths = np.asarray([len(sample.input_ids) for sample in samples], dtype=np.int64)
    prompts = np.asarray([sample.prompt_length for sample in samples], dtype=np.int64)
    row = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    token_sample = np.repeat(np.arange(len(samples)), lengths)
    position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    learned = np.flatnonzero(position >= prompts[token_sample])
    counts = np.maximum(lengths - prompts, 0)
    tasks = [sample.task_id for sample in samples]
    return MicroBatch(
        input_ids=torch.from_numpy(row)[None],
        position_ids=torch.from_numpy(position)[None],
        target_index=torch.from_numpy(learned - 1),
        targets=torch.from_numpy(row[learned]),
        target_sample=torch.from_numpy(token_sample[learned]),
        token_sample=torch.from_numpy(token_sample),
        token_branch=None,
        sample_ids=torch.tensor([sample.sample_id for sample in samples]),
        task_ids=torch.tensor(tasks),
        target_counts=torch.from_numpy(counts),
        cu_seq_lens=cumulative_lengths(lengths),
        max_length=int(lengths.max()),
        tasks_and_targets=tuple(zip(tasks, counts.tolist(), strict=True)),
        token_counts=tuple(lengths.tolist()),
    )


# How samples follow one another. 1, of states that name none: an epoch did not carry remainders to the next.
ORDER = 2
MOST_EPOCHS_COUNTED = 50_000


class TrainLoader(Iterator[list[MicroBatch]]):
    """Endless iterator: for each optimizer step the list of this rank's micro-batches, one per accumulation step.

    Epochs stand behind one another, so a global batch may hold the end of one epoch and the start of the next. Of a
    global batch, micro-batch `a` of rank `r` holds samples (a * world_size + r) * B to the next B, where B is
    `micro_batch_size`: the global batches are the same for every world size.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        task_sizes: Sequence[int],
        global_batch_size: int,
        micro_batch_size: int,
        shares: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        fingerprint: str | None = None,
    ) -> None:
        """Draw from `samples`: `samples[i]` has sample_id i, and a task's are adjacent; `shares` None is proportional.

        `fingerprint` names the data in saved states; None hashes all samples.
        Raises TopologyError if the batch sizes do not divide, DataError if the sizes do not fit the samples.
        """
        if global_batch_size % (micro_batch_size * world_size) != 0:
            raise TopologyError(
                f"global_batch_size={global_batch_size} must be a multiple of per_device_train_batch_size="
                f"{micro_batch_size} times {world_size} processes"
            )
        if not 0 <= rank < world_size:
            raise TopologyError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if sum(task_sizes) != len(samples):
            raise DataError(f"task sizes {list(task_sizes)} do not add up to the {len(samples)} samples")
        self._samples = samples
        self._sizes = tuple(task_sizes)
        self._shares = tuple(shares) if shares is not None else mixture_shares(task_sizes)
        self._micro_batch_size, self._rank, self._world_size = micro_batch_size, rank, world_size
        self._seed = seed
        self._fingerprint = fingerprint if fingerprint is not None else fingerprint_of(samples)
        self._consumed = 0
        self._counts = EpochCounts(self._shares, len(samples))
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self.global_batch_size = global_batch_size

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch: as many as the data hold."""
        return len(self._samples)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps an epoch takes; not whole where a global batch spans two epochs."""
        return self.epoch_size / self.global_batch_size

    def steps_for(self, num_epochs: float) -> int:
        """Count the optimizer steps that see `num_epochs` epochs, the last batch filled up from the next."""
        return max(1, math.ceil(num_epochs * self.steps_per_epoch - 1e-9))

    @property
    def epoch(self) -> float:
        """Epochs consumed so far, with fraction."""
        return self._consumed / self.epoch_size

    def __next__(self) -> list[MicroBatch]:
        batch = self.global_batch(self._consumed)
        self._consumed += self.global_batch_size
        shape = (-1, self._world_size, self._micro_batch_size)
        return [collate([self._samples[int(i)] for i in ids]) for ids in batch.reshape(shape)[:, self._rank]]

    def global_batch(self, start: int) -> Indices:
        """Return the sample ids, (global_batch_size,), of the batch that begins after `start` samples, on any rank."""
        parts, left = [], self.global_batch_size
        while left > 0:
            epoch, position = divmod(start, self.epoch_size)
            part = self._order(epoch)[position : position + left]
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> Indices:
        return epoch_order(self._sizes, self._shares, seed=self._seed, epoch=epoch, counts=self._counts)

    def unseen(self, steps: int) -> list[int]:
        """Return the tasks of which a run of `steps` optimizer steps draws no sample.

        A task whose share of them is two samples has been drawn: `EpochCounts` is never that far off. Where a share is
        so small that only counting through MOST_EPOCHS_COUNTED epochs would tell, none is named.
        """
        enough = 2 / min(self._shares) + self.epoch_size
        taken = steps * self.global_batch_size
        if taken >= enough or taken > MOST_EPOCHS_COUNTED * self.epoch_size:
            return []
        return [task for task, count in enumerate(self.drawn(steps)) if count == 0]

    def drawn(self, steps: int) -> tuple[int, ...]:
        """Count the samples of each task in the first `steps` optimizer steps of a run."""
        epoch, position = divmod(steps * self.global_batch_size, self.epoch_size)
        last = self._order(epoch)[:position]
        counts = np.histogram(last, bins=np.cumsum([0, *self._sizes]))[0]
        return tuple(int(before + count) for before, count in zip(self._counts.before(epoch), counts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch begins, as plain values, the same on all ranks and for any number of them."""
        epoch, position = divmod(self._consumed, self.epoch_size)
        return {"epoch": epoch, "position": position, "order": ORDER, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        """Resume from `state`. Raises CheckpointError if it belongs to other data, shares or another seed."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the data's state was saved with {name}={state.get(name)!r}, this run has {value!r}; the same "
                    "samples would not be drawn again"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        self._check_order(state.get("order", 1), epoch + (position > 0))
        self._consumed = epoch * self.epoch_size + position
        return self

    def _check_order(self, order: int, epochs: int) -> None:
        """Raise CheckpointError unless the samples of the epochs seen were drawn as this version draws them."""
        if order == ORDER:
            return
        first = self._counts.of(0)
        if order != 1 or any(self._counts.of(epoch) != first for epoch in range(1, epochs)):
            raise CheckpointError(
                f"the data's state was saved with order={order!r} by another version of malora_dist, which draws the "
                f"samples of epochs in another way than this one (order={ORDER}); resume with that version, or start a "
                "new run"
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "task_sizes": list(self._sizes),
            "shares": list(self._shares),
        }


def fingerprint_of(samples: Sequence[Sample]) -> str:
    """Hash all samples' ids, prompt lengths and tasks."""
    digest = hashlib.sha256()
    for sample in samples:
        ids = np.ascontiguousarray(sample.input_ids, dtype=np.int32)
        digest.update(np.asarray([len(ids), sample.prompt_length, sample.task_id], dtype=np.int64).tobytes())
        digest.update(ids.tobytes())
    return digest.hexdigest()
