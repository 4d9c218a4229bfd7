"""How many samples of each task an epoch holds, and in which order: pure functions of sizes, shares, seed and epoch."""

import math
from collections.abc import Sequence
from operator import add

import numpy as np
import numpy.typing as npt

from malora_dist.errors import DataError

Indices = npt.NDArray[np.int64]


def mixture_shares(
    sizes: Sequence[int],
    mixture: str = "proportional",
    *,
    temperature: float = 2.0,
    weights: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Compute the share p_i of each task: weight_i * n_i^(1/T), where T is 1 (proportional), given, or infinite.

    The shares sum to 1. `sizes` are numbers of training samples after any cap. Raises DataError for a task without
    samples, or for weights that are too large or too small to give shares.
    """
    if not sizes or min(sizes) < 1:
        raise DataError(f"every task needs at least one training sample, the sizes are {list(sizes)}")
    exponent = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / temperature}[mixture]
    raw = [weight * size**exponent for size, weight in zip(sizes, weights or [1.0] * len(sizes), strict=True)]
    total = sum(raw)
    if not (math.isfinite(total) and min(raw) > 0):
        raise DataError(f"the weights {list(weights or ())} with the sizes {list(sizes)} give no shares")
    return tuple(value / total for value in raw)


class EpochCounts:
    """Samples of each task in one epoch after another, in all `epoch_size`: shares rounded by largest remainders.

    What an epoch gives a task too much or too little is carried to the next, so that over epochs each gets its share,
    however small.
    """

    def __init__(self, shares: Sequence[float], epoch_size: int) -> None:
        self._shares, self._size = tuple(shares), epoch_size
        self._start_again()

    def _start_again(self) -> None:
        self._epoch = 0
        self._before: tuple[int, ...] = (0,) * len(self._shares)

    def before(self, epoch: int) -> tuple[int, ...]:
        """Count the samples of each task in all epochs before this one. Quick for epochs in ascending order."""
        if epoch < self._epoch:
            self._start_again()
        while self._epoch < epoch:
            self._before = self._sum(self._next())
            self._epoch += 1
        return self._before

    def of(self, epoch: int) -> tuple[int, ...]:
        """Count the samples of each task in this epoch."""
        self.before(epoch)
        return self._next()

    def _sum(self, counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(add, self._before, counts))

    def _next(self) -> tuple[int, ...]:
        given = self._size * (self._epoch + 1)
        owed = [share * given - before for share, before in zip(self._shares, self._before, strict=True)]
        counts = [max(0, int(value)) for value in owed]
        by_remainder = sorted(range(len(owed)), key=lambda task: (counts[task] - owed[task], task))
        spare = self._size - sum(counts)
        for task in by_remainder[: max(0, spare)]:
            counts[task] += 1
        # A task may have had more than its share before, which the others then lack here.
        for task in [task for task in reversed(by_remainder) if counts[task]][: max(0, -spare)]:
            counts[task] -= 1
        return tuple(counts)


def epoch_counts(shares: Sequence[float], epoch_size: int, epoch: int = 0) -> tuple[int, ...]:
    """Count the samples of each task in one epoch."""
    return EpochCounts(shares, epoch_size).of(epoch)


def epoch_order(
    sizes: Sequence[int], shares: Sequence[float], *, seed: int, epoch: int, counts: EpochCounts | None = None
) -> Indices:
    """Return the sample ids of one epoch, (sum(sizes),); task i's samples have the ids from sum(sizes[:i]) on.

    `counts` are those of the shares, for a caller that asks for many epochs.

    Tasks are spread evenly: every stretch of an epoch holds them nearly in their shares. Each task's samples come
    without replacement until all were seen, then in a new order; over epochs all of them come equally often.
    """
    counts = counts or EpochCounts(shares, sum(sizes))
    first_ids = np.cumsum([0, *sizes])
    ids, places = [], []
    for task, (size, before, count) in enumerate(zip(sizes, counts.before(epoch), counts.of(epoch), strict=True)):
        random = np.random.default_rng([seed, epoch, task])
        ids.append(first_ids[task] + _task_samples(size, before, count, seed=seed, epoch=epoch, task=task))
        places.append((np.arange(count) + random.random(count)) / max(count, 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(ids)[order].astype(np.int64)


def _task_samples(size: int, before: int, count: int, *, seed: int, epoch: int, task: int) -> Indices:
    """Draw the `count` samples of a task in an epoch, after `before` in earlier ones.

    They are a window of one endless cycle, each pass of it shuffled anew.
    """
    cycle = np.random.default_rng([seed, task]).permutation(size)
    window = cycle[(before + np.arange(count)) % size]
    random = np.random.default_rng([seed, epoch, task, size])
    passes = [random.permutation(window[start : start + size]) for start in range(0, count, size)]
    return np.concatenate(passes) if passes else window
