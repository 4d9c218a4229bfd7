"""The paired bootstrap, beside its naive twin, and on differences that are known."""

import numpy as np
import pytest

from malora_dist.bench.quality.statistics import paired_difference, resampled_means
from tests import reference


def test_resampled_means_are_those_of_the_samples() -> None:
    generator = np.random.default_rng(3)
    delta_SN = generator.normal(size=(3, 7))
    seeds_DS = generator.integers(3, size=(5, 3))
    questions_DN = generator.integers(7, size=(5, 7))
    counts = [
        np.stack([np.bincount(row, minlength=size) for row in picks])
        for picks, size in ((seeds_DS, 3), (questions_DN, 7))
    ]
    expected = reference.resampled_means(delta_SN, seeds_DS, questions_DN)
    np.testing.assert_allclose(resampled_means(delta_SN, *counts), expected, rtol=1e-12)


def test_a_lead_on_every_question_is_certain() -> None:
    first, second = [{"a": np.ones(20), "b": np.ones(5)}] * 2, [{"a": np.zeros(20), "b": np.zeros(5)}] * 2
    found = paired_difference(first, second, draws=100)
    assert (found.mean, found.low, found.high, found.verdict) == (1.0, 1.0, 1.0, "better")
    assert (found.seeds, found.questions) == (2, 25)
    assert paired_difference(second, first, draws=100).verdict == "worse"


def test_standard_error_and_smallest_difference_of_independent_questions() -> None:
    """With one seed and one task the bootstrap's standard error is that of a mean of N paired differences."""
    generator = np.random.default_rng(5)
    first, second = (generator.integers(2, size=400).astype(float) for _ in range(2))
    found = paired_difference([{"a": first}], [{"a": second}], draws=20_000)
    expected = (first - second).std() / np.sqrt(400)
    assert found.standard_error == pytest.approx(expected, rel=0.03)
    assert found.low == pytest.approx(found.mean - 1.96 * expected, abs=0.004)
    assert found.smallest_seen == pytest.approx(2.8 * expected, rel=0.03)


def test_tasks_count_the_same_whatever_their_sizes() -> None:
    zeros = {"a": np.zeros(90), "b": np.zeros(10)}
    found = paired_difference([zeros | {"a": np.ones(90)}], [zeros], draws=9)
    assert found.mean == 0.5


def test_the_spread_of_seeds_widens_the_interval() -> None:
    """The same questions, but one seed of two won by a lot and lost by the other: nothing is seen."""
    first, second = [{"a": np.ones(50)}, {"a": np.zeros(50)}], [{"a": np.zeros(50)}, {"a": np.ones(50)}]
    found = paired_difference(first, second, draws=200)
    assert found.verdict == "not seen" and found.low == -1.0 and found.high == 1.0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], "at least one"),
        ([{"a": np.ones(2)}], [{"b": np.ones(2)}], "the same tasks"),
        ([{"a": np.ones(2)}], [{"a": np.ones(3)}], "the same questions"),
    ],
)
def test_runs_that_are_no_pairs_are_refused(first: list, second: list, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second)
