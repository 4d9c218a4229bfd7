"""Is a difference of two methods more than noise? A bootstrap over seeds and questions that are the same for both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 10_000
# Two-sided 5 % and a power of 80 %: the difference that is then seen, in standard errors.
SEEN_AT = 1.96 + 0.84


@dataclass(frozen=True)
class Difference:
    """The first method's mean score over tasks minus the second's.

    low, high: interval of 95 %. standard_error: of `mean`. seeds: number of pairs of runs. questions: of all tasks.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    seeds: int
    questions: int

    @property
    def smallest_seen(self) -> float:
        """The smallest true difference that such a comparison finds in 80 % of cases."""
        return SEEN_AT * self.standard_error

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval is on one side of 0, else `not seen`."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not seen"


def paired_difference(
    first: Sequence[Mapping[str, Array]], second: Sequence[Mapping[str, Array]], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Compare two methods on the same questions with the same seeds.

    Seeds, and within each task questions, are drawn again with replacement, for both methods alike. With one seed the
    interval says nothing of other seeds; with few it is too narrow, by about sqrt(1 - 1 / seeds).

    Args:
        first, second: for each seed the (N,) scores of a task's questions, by task.
        draws: of the bootstrap.
        seed: of its random numbers.

    Returns:
        The difference of means over seeds, questions and tasks.

    Raises:
        ValueError: they are not of the same tasks, questions and number of seeds, or of none.
    """
    deltas = _deltas(first, second)
    S = len(first)
    generator = np.random.default_rng(seed)
    seed_counts_DS = generator.multinomial(S, [1 / S] * S, size=draws)
    values_D = np.zeros(draws)
    for delta_SN in deltas.values():
        N = delta_SN.shape[1]
        question_counts_DN = generator.multinomial(N, [1 / N] * N, size=draws)
        values_D += resampled_means(delta_SN, seed_counts_DS, question_counts_DN) / len(deltas)
    mean = float(np.mean([delta_SN.mean() for delta_SN in deltas.values()]))
    low, high = np.percentile(values_D, [2.5, 97.5])
    questions = sum(delta_SN.shape[1] for delta_SN in deltas.values())
    return Difference(mean, float(low), float(high), float(values_D.std(ddof=1)), S, questions)


def resampled_means(delta_SN: Array, seed_counts_DS: NDArray[np.int64], question_counts_DN: NDArray[np.int64]) -> Array:
    """Return (D,) means of samples of a table, given how often each row and each column is in each sample.

    Args:
        delta_SN: the table, a row for each seed and a column for each question.
        seed_counts_DS: how often each seed was drawn; rows sum to S.
        question_counts_DN: how often each question was drawn; rows sum to N.
    """
    S, N = delta_SN.shape
    means_D: Array = np.einsum("ds,sn,dn->d", seed_counts_DS, delta_SN, question_counts_DN, optimize=True) / (S * N)
    return means_D


def _deltas(first: Sequence[Mapping[str, Array]], second: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    if not first or len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} runs: as many runs of both methods are needed, and at least one"
        )
    if any(set(run) != set(first[0]) for run in (*first, *second)):
        raise ValueError("all runs must be of the same tasks")
    deltas = {}
    for task in first[0]:
        pairs = list(zip((run[task] for run in first), (run[task] for run in second), strict=True))
        if len({len(scores) for pair in pairs for scores in pair}) != 1:
            raise ValueError(f"task {task!r}: all runs must be of the same questions")
        deltas[task] = np.stack([one - other for one, other in pairs])
    return deltas
