"""What messages show of a value."""

from typing import Any

import pytest

from malora_dist.errors import short


@pytest.mark.parametrize(
    "value", [None, 1.5, "a\n", [1, "b", None], {"a": [1]}, (), "x" * 500, list(range(99)), 10**99, {"k" * 90: 1}]
)
def test_a_value_is_shown_as_python_writes_it_up_to_a_length(value: Any) -> None:
    text = repr(value)
    assert short(value) == (text if len(text) <= 80 else f"{text[:77]}...")
    assert short(value, 60) == (text if len(text) <= 60 else f"{text[:57]}...")


def test_a_value_that_is_nested_deeper_than_python_writes_is_shown() -> None:
    value: Any = []
    for _ in range(10_000):
        value = [value]
    assert short(value).startswith("[[[[[[[...")
