"""How many samples of each task an epoch holds, and in which order: pure functions of sizes, shares, seed and epoch."""

from collections.abc import Sequence

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
    """Share p_i of each task, summing to 1: weight_i * n_i^(1/T), where T is 1 (proportional), given, or infinite.

    `sizes` are numbers of training samples after any cap. Raises DataError for a task without samples.
    """
    if not sizes or min(sizes) < 1:
        raise DataError(f"every task needs at least one training sample, the sizes are {list(sizes)}")
    exponent = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / temperature}[mixture]
    raw = [weight * size**exponent for size, weight in zip(sizes, weights or [1.0] * len(sizes), strict=True)]
    return tuple(value / sum(raw) for value in raw)


def epoch_counts(shares: Sequence[float], epoch_size: int) -> tuple[int, ...]:
    """Samples of each task in an epoch: `share * epoch_size` rounded (largest remainders), in all `epoch_size`."""
    exact = [share * epoch_size for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda task: (counts[task] - exact[task], task))
    for task in by_remainder[: epoch_size - sum(counts)]:
        counts[task] += 1
    return tuple(counts)


def epoch_order(sizes: Sequence[int], shares: Sequence[float], *, seed: int, epoch: int) -> Indices:
    """Sample ids of one epoch, (sum(sizes),); task i's samples have the ids from sum(sizes[:i]) on.

    Tasks are spread evenly: every stretch of an epoch holds them nearly in their shares. Each task's samples come
    without replacement until all were seen, then in a new order; over epochs all of them come equally often.
    """
    counts = epoch_counts(shares, sum(sizes))
    first_ids = np.cumsum([0, *sizes])
    ids, places = [], []
    for task, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        random = np.random.default_rng([seed, epoch, task])
        ids.append(first_ids[task] + _task_samples(size, count, seed=seed, epoch=epoch, task=task))
        places.append((np.arange(count) + random.random(count)) / max(count, 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(ids)[order].astype(np.int64)


def _task_samples(size: int, count: int, *, seed: int, epoch: int, task: int) -> Indices:
    """The `count` samples of a task in an epoch: a window of one endless cycle, each pass of it shuffled anew."""
    cycle = np.random.default_rng([seed, task]).permutation(size)
    window = cycle[(epoch * count + np.arange(count)) % size]
    random = np.random.default_rng([seed, epoch, task, size])
    passes = [random.permutation(window[start : start + size]) for start in range(0, count, size)]
    return np.concatenate(passes) if passes else window
