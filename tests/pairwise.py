"""Few cases that hold every pair of choices: what two settings do to each other shows, three are left to corners."""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Case) -> set[Pair]:
    return set(combinations(sorted(case.items()), 2))


def pairwise(choices: dict[str, list[Any]]) -> list[Case]:
    """Cases that together hold every pair of values, chosen greedily."""
    left = list(_all(choices))
    missing = set().union(*map(pairs_of, left))
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


def _all(choices: dict[str, list[Any]]) -> Iterator[Case]:
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))
