"""No group on two sides, sizes as asked, the same cut every time, and leaks leave the training rows only."""

from collections import Counter
from typing import Any

import pytest

from malora_dist.data.example import Example
from malora_dist.data.splits import Splits, cap, cut_splits, group_key, remove_leaks
from malora_dist.errors import DataError


def example(prompt: str, group: str | None = None, choices: tuple[str, ...] = ()) -> Example:
    return Example("t", prompt, "r", choices, 0 if choices else None, group)


def rows(number: int, per_group: int = 1) -> list[Example]:
    return [example(f"prompt {i}", f"g{i // per_group}") for i in range(number)]


@pytest.mark.parametrize(("test_size", "expected"), [(30, 30), (0.1, 20), (1, 1)])
def test_sizes(test_size: float, expected: int) -> None:
    splits = cut_splits(rows(200), test_size=test_size, validation_size=0.25)
    assert (len(splits.test), len(splits.validation), len(splits.train)) == (expected, 50, 150 - expected)


def test_groups_stay_together() -> None:
    examples = [example(f"prompt {i}", f"g{i * i % 37}") for i in range(300)]
    splits = cut_splits(examples, test_size=60, validation_size=40)
    sides = [{e.group for e in part} for part in (splits.train, splits.validation, splits.test)]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sorted(e.prompt for part in (splits.train, splits.validation, splits.test) for e in part) == sorted(
        e.prompt for e in examples
    )


def test_repeated_prompts_are_a_group_when_none_is_given() -> None:
    examples = [example(f"Prompt {i % 20}" + "!" * (i % 3), choices=(f"a{i}", "b")) for i in range(100)]
    splits = cut_splits(examples, test_size=25)
    assert len(splits.test) == 25
    assert {group_key(e) for e in splits.test}.isdisjoint(group_key(e) for e in splits.train)


def test_same_cut_every_time_and_another_for_another_seed() -> None:
    examples = rows(100)
    first = cut_splits(examples, test_size=20, seed=3)
    assert cut_splits(list(reversed(examples)), test_size=20, seed=3).test == tuple(reversed(first.test))
    assert cut_splits(examples, test_size=20, seed=4).test != first.test
    larger = cut_splits(examples, test_size=30, seed=3)
    assert set(e.prompt for e in first.test) < set(e.prompt for e in larger.test)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test_size": 10}, "does not leave any of the 10 rows"),
        ({"test_size": 5, "validation_size": 5}, "leave none of the 10 rows"),
    ],
)
def test_nothing_left_to_train_on(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cut_splits(rows(10), **sizes)


def test_a_group_that_does_not_fit_is_an_error_not_a_leak() -> None:
    with pytest.raises(DataError, match="no group of at most 2 rows is left"):
        cut_splits(rows(10, per_group=5), test_size=2)


def test_leaks_leave_train_only_and_are_counted_by_kind() -> None:
    story = "a long story of a farmer who had seventeen sheep and sold all but nine of them at the market on"
    train = (
        example(f"{story} monday"),
        example("exactly equal", choices=("x", "y")),
        example("fine"),
        example("of a group", "shared"),
        example("same prompt", choices=("one thing", "two things")),
    )
    held = (example(f"{story} tuesday"), example("Exactly equal.", choices=("y", "x")), example("other", "shared"))
    asked = (example("same prompt", choices=("red roses", "blue violets")),)
    splits, counts = remove_leaks(Splits(train, held, asked), near_duplicate_threshold=0.8)
    assert counts == {"shared_groups_removed": 1, "leaked_duplicates_removed": 1, "near_duplicates_removed": 1}
    assert [e.prompt for e in splits.train] == ["fine", "same prompt"]
    assert (splits.validation, splits.test) == (held, asked)
    without, counts = remove_leaks(Splits(train, held, asked), near_duplicate_threshold=None)
    assert counts["near_duplicates_removed"] == 0 and len(without.train) == 3


def test_work_on_many_rows_can_be_ended() -> None:
    """Nothing of it takes all rows at once without a word."""
    seen: Counter[str] = Counter()
    splits = cut_splits(rows(60), test_size=20, watch=lambda work, *_: seen.update([work]))
    remove_leaks(splits, near_duplicate_threshold=0.8, watch=lambda work, *_: seen.update([work]))
    assert seen == {
        "grouping rows": 60,
        "cutting splits": 60,
        "reading held-out rows": 2 * 20,
        "indexing held-out rows": 20,
        "comparing with held-out rows": 40,
        "looking for nearly the same among held-out rows": 40,
    }


def test_cap_picks_at_random_and_keeps_the_order() -> None:
    examples = tuple(rows(1000))
    capped = cap(examples, 100, seed=0)
    numbers = [int(e.prompt.split()[1]) for e in capped]
    assert numbers == sorted(numbers) and len(set(numbers)) == 100
    assert numbers[0] < 100 and numbers[-1] > 900
    assert cap(examples, 100, seed=1) != capped
