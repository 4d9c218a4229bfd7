"""JSON that nobody means is a ValueError that says why, whatever Python's reader makes of it."""

import pytest

from malora_dist.files.json_text import DEEPEST, key_given_twice, parse_json


def test_values_are_those_of_the_text() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e4"]}') == {"a": [1, 2.5, None, True, "ä"]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) and parse_json(b"7") == 7


def test_our_own_measurements_may_hold_what_is_not_finite() -> None:
    assert str(parse_json("[NaN, Infinity, -Infinity, 1, 1e999]", non_finite=True)) == "[nan, inf, -inf, 1, inf]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ("[NaN]", "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than 100 deep"),
        ("[" * 99_999, "nested more than 100 deep"),
        ("9" * 5000, "4300 digits"),
        ("[-1e999]", "-1e999 is too large for a number"),
        (b'"\xff"', "codec can't decode"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)  # fmt: skip
def test_what_is_none_is_said(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


class Counted(str):
    """A key that counts how often it is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return super().__eq__(other)


def test_a_file_of_many_keys_is_read_in_time_that_grows_with_it() -> None:
    """A header of 5 MB would take hours if each key were looked for among all others."""
    pairs = [(Counted(number), None) for number in [*range(1000), 999]]
    assert key_given_twice(pairs[:-1]) is None and key_given_twice(pairs) == "999"
    assert Counted.compared < 10_000
