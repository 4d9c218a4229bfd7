import pytest

from malora_dist.console.durations import as_clock, in_words


@pytest.mark.parametrize(
    ("seconds", "words", "clock"),
    [
        (8.4, "8 s", "0:00:08"),
        (59.6, "1 min 0 s", "0:01:00"),
        (725, "12 min 5 s", "0:12:05"),
        (12_000, "3 h 20 min", "3:20:00"),
    ],
)
def test_durations(seconds: float, words: str, clock: str) -> None:
    assert (in_words(seconds), as_clock(seconds)) == (words, clock)
