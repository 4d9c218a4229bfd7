"""Shares, counts and the order of an epoch."""

from collections import Counter

import numpy as np
import pytest

from malora_dist.data.mixture import EpochCounts, epoch_counts, epoch_order, mixture_shares
from malora_dist.errors import DataError

SIZES = (1000, 250, 10)


@pytest.mark.parametrize(
    ("mixture", "weights", "expected"),
    [
        ("proportional", None, (1000 / 1260, 250 / 1260, 10 / 1260)),
        ("uniform", None, (1 / 3, 1 / 3, 1 / 3)),
        ("temperature", None, tuple(np.sqrt(SIZES) / np.sqrt(SIZES).sum())),
        ("uniform", (1.0, 2.0, 1.0), (0.25, 0.5, 0.25)),
        ("proportional", (1.0, 4.0, 100.0), (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_shares(mixture: str, weights: tuple[float, ...] | None, expected: tuple[float, ...]) -> None:
    assert mixture_shares(SIZES, mixture, weights=weights) == pytest.approx(expected)


def test_temperature_goes_from_proportional_to_uniform() -> None:
    assert mixture_shares(SIZES, "temperature", temperature=1) == pytest.approx(mixture_shares(SIZES))
    assert mixture_shares(SIZES, "temperature", temperature=1e9) == pytest.approx([1 / 3] * 3)


def test_an_empty_task_is_refused() -> None:
    with pytest.raises(DataError, match="at least one training sample"):
        mixture_shares((5, 0))


@pytest.mark.parametrize("weights", [(1e308, 1.0), (0.0, 1.0), (float("nan"), 1.0)])
def test_weights_that_give_no_shares_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="give no shares"):
        mixture_shares((2000, 3000), weights=weights)


def test_counts_are_the_shares_rounded_in_each_epoch_and_over_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shares = rng.dirichlet(np.full(rng.integers(1, 9), rng.choice([0.1, 1.0, 9.0])))
        size = int(rng.integers(1, 500))
        counts, total = EpochCounts(shares.tolist(), size), np.zeros(len(shares))
        first = counts.of(0)
        assert all(abs(count - share * size) < 1 for count, share in zip(first, shares, strict=True))
        for epoch in range(40):
            assert np.array_equal(counts.before(epoch), total)
            here = np.asarray(counts.of(epoch))
            assert tuple(here) == epoch_counts(shares.tolist(), size, epoch)
            total += here
            assert here.sum() == size and here.min() >= 0
            assert np.abs(total - shares * size * (epoch + 1)).max() < 1.5
        assert counts.of(0) == first and counts.before(40) == tuple(total)


def test_a_task_whose_share_is_below_one_sample_gets_its_turn() -> None:
    sizes, weights = (2000, 3), (1.0, 0.1)
    shares = mixture_shares(sizes, weights=weights)
    seen = Counter(int(i) for epoch in range(50) for i in epoch_order(sizes, shares, seed=42, epoch=epoch) if i >= 2000)
    assert sum(seen.values()) == pytest.approx(50 * 2003 * shares[1], abs=1) == pytest.approx(15, abs=0.1)
    assert set(seen.values()) == {5}


@pytest.mark.parametrize("mixture", ["proportional", "uniform", "temperature"])
def test_an_epoch(mixture: str) -> None:
    shares = mixture_shares(SIZES, mixture)
    counts = epoch_counts(shares, sum(SIZES))
    task_of = np.repeat(np.arange(3), SIZES)
    order = epoch_order(SIZES, shares, seed=1, epoch=0)
    assert tuple(np.bincount(task_of[order], minlength=3)) == counts
    for task, size in enumerate(SIZES):
        mine = order[task_of[order] == task]
        passes = [mine[start : start + size] for start in range(0, len(mine), size)]
        assert all(len(set(part)) == len(part) for part in passes), "a sample came again before all were seen"
    # Each stretch holds the tasks nearly in their shares: no batch is of one task only.
    seen = np.cumsum(np.eye(3)[task_of[order]], axis=0)
    ideal = np.outer(np.arange(1, len(order) + 1), shares)
    assert np.abs(seen - ideal).max() <= 3


def test_a_pure_function_of_seed_and_epoch() -> None:
    shares = mixture_shares(SIZES, "uniform")
    first = epoch_order(SIZES, shares, seed=1, epoch=5)
    assert np.array_equal(first, epoch_order(SIZES, shares, seed=1, epoch=5))
    assert not np.array_equal(first, epoch_order(SIZES, shares, seed=1, epoch=6))
    assert not np.array_equal(first, epoch_order(SIZES, shares, seed=2, epoch=5))


def test_passes_within_an_epoch_differ_in_order() -> None:
    order = epoch_order((4, 400), mixture_shares((4, 400), "uniform"), seed=0, epoch=0)
    mine = order[order < 4].tolist()
    passes = {tuple(mine[start : start + 4]) for start in range(0, 200, 4)}
    assert len(passes) > 10


def test_over_epochs_all_samples_come_equally_often() -> None:
    shares = mixture_shares(SIZES, "uniform")
    seen = Counter(int(i) for epoch in range(5) for i in epoch_order(SIZES, shares, seed=3, epoch=epoch))
    for task, first in enumerate((0, 1000, 1250)):
        times = [seen[i] for i in range(first, first + SIZES[task])]
        assert max(times) - min(times) <= 1
