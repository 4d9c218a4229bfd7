"""Launches, waits and atomics are what counts.json says, to the last one."""

from importlib.metadata import version

import pytest

from tests.strict.counts import count_all, differences, read

pytestmark = pytest.mark.distributed


def test_counts_are_the_golden_ones() -> None:
    changed = differences(count_all(), read())
    assert not changed, (
        "\n".join(["other counts than tests/strict/counts.json:", *changed])
        + f"\nThey were counted with the versions in constraints.txt, here are {versions()}."
        + "\nIf that is meant: python -m tests.strict.counts --write"
    )


def versions() -> str:
    """Return the versions of what launches the operations of a step."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))


def test_a_difference_names_row_and_numbers() -> None:
    wanted = {"a": {"launches": 3, "waits": 1}, "b": {"launches": 1}}
    assert differences({"a": {"launches": 2, "waits": 1}, "c": {"launches": 1}}, wanted) == [
        "a: launches 3 -> 2",
        "b: not counted",
        "c: not in the file",
    ]
    assert differences(wanted, wanted) == []
