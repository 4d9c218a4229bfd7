"""Turns, and ratios of pairs. No time is asserted."""

from collections.abc import Callable
from itertools import pairwise, permutations

import pytest

from malora_dist.bench.local.timing import interleave, records_of, reference
from malora_dist.bench.results import quartiles
from malora_dist.errors import ConfigError


def test_all_take_one_turn_a_round_and_nobody_always_follows_the_same_one() -> None:
    order: list[str] = []
    subjects: dict[str, Callable[[], object]] = {name: (lambda name=name: order.append(name)) for name in "abcd"}
    runs = []
    for _ in range(2):
        order.clear()
        seconds = interleave(subjects, repeats=18, warmup=2, device="cpu")
        runs.append(["".join(order[4 * i : 4 * i + 4]) for i in range(20)])
    assert runs[0] == runs[1] and len(order) == 80 and all(set(each) == {*"abcd"} for each in runs[0])
    before = {(first, second) for each in runs[0] for first, second in pairwise(each)}
    assert before == set(permutations("abcd", 2))
    assert list(seconds) == [*"abcd"] and all(len(taken) == 18 for taken in seconds.values())
    assert min(min(taken) for taken in seconds.values()) > 0


def test_ratios_are_of_the_same_round() -> None:
    times = {"a": [1.0, 10.0, 4.0], "b": [2.0, 30.0, 4.0]}
    a, b = records_of("case", times, "a", {"b": {"r": 3}})
    assert (a.median_s, a.ratio, a.ratio_quartiles, a.facts) == (4.0, 1.0, (1.0, 1.0), {})
    # Of pairs (2, 3, 1), though the medians of both are 4.
    assert (b.median_s, b.ratio, b.ratio_quartiles) == (4.0, 2.0, (1.5, 2.5))
    assert (b.name, b.case, b.against, b.facts) == ("b", "case", "a", {"r": 3})
    assert quartiles([7.0]) == (7.0, 7.0)


def test_whom_ratios_are_to() -> None:
    assert reference(None, ["base", "peft_lora"]) == "peft_lora"
    assert reference(None, ["base", "lora"]) == "base"
    assert reference("lora", ["base", "lora"]) == "lora"
    with pytest.raises(ConfigError, match="--against 'dora' takes no part: base"):
        reference("dora", ["base"])
