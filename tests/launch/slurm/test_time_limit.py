import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.slurm.time_limit import check_save_before, limit_seconds, seconds_left


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1", 60), ("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-0", 172800), ("1-2:03", 93780),
     ("1-2:03:04", 93784), ("UNLIMITED", None), ("0", None)],
)  # fmt: skip
def test_slurms_forms(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-", "12:00:", "1.5"])
def test_what_slurm_would_not_read(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--time={text}: must be minutes"):
        limit_seconds(text)


def test_a_limit_that_leaves_no_time_to_train() -> None:
    check_save_before("UNLIMITED", 300)
    check_save_before("1", 59)
    with pytest.raises(ConfigError, match="--save-before=300 must be less than the 300 seconds of --time=5"):
        check_save_before("5", 300)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("42", 42),
        ("1:30", 90),
        ("02:03:04", 7384),
        ("1-00:00:00", 86400),
        ("3-02:03:04", 266584),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_slurms_words_for_a_duration(text: str, seconds: float | None) -> None:
    assert seconds_left(text) == seconds
