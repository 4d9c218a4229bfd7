"""Turns, and ratios of pairs. No time is asserted."""

import pytest

from malora_dist.bench.local.timing import interleave, quartiles, records_of, reference
from malora_dist.errors import ConfigError


def test_each_round_begins_with_another_subject() -> None:
    order: list[str] = []
    subjects = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(subjects, repeats=4, warmup=2, device="cpu")
    rounds = ["".join(order[3 * i : 3 * i + 3]) for i in range(6)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab", "abc"]
    assert list(seconds) == ["a", "b", "c"] and all(len(taken) == 4 for taken in seconds.values())
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
    assert reference(None, {"base": [1.0], "peft_lora": [1.0]}) == "peft_lora"
    assert reference(None, {"base": [1.0], "lora": [1.0]}) == "base"
    assert reference("lora", {"base": [1.0], "lora": [1.0]}) == "lora"
    with pytest.raises(ConfigError, match="--against 'dora' takes no part: base"):
        reference("dora", {"base": [1.0]})
