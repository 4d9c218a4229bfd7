"""JSON that nobody means is a ValueError that says why, whatever Python's reader makes of it."""

import pytest

from malora_dist.files.json_text import DEEPEST, parse_json


def test_values_are_those_of_the_text() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e4"]}') == {"a": [1, 2.5, None, True, "ä"]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) and parse_json(b"7") == 7


def test_our_own_measurements_may_hold_what_is_not_finite() -> None:
    assert str(parse_json("[NaN, Infinity, -Infinity, 1]", non_finite=True)) == "[nan, inf, -inf, 1]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ("[NaN]", "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than 100 deep"),
        ("[" * 99_999, "nested more than 100 deep"),
        ("9" * 5000, "4300 digits"),
        (b'"\xff"', "codec can't decode"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)  # fmt: skip
def test_what_is_none_is_said(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
