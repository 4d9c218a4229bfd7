import doctest

import pytest

from malora_dist.errors import ConfigError
from malora_dist.plan import units
from malora_dist.plan.units import parse_bytes, parse_flops, parse_rate


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GiB", 80 * 2**30), ("40 GB", 40 * 10**9), ("1.5TiB", 3 * 2**39), ("80e9", 8 * 10**10), ("512B", 512)],
)
def test_sizes(text: str, number: int) -> None:
    assert parse_bytes("--hbm", text) == number


def test_rates() -> None:
    assert parse_rate("--intra", "450GB/s") == parse_rate("--intra", "450e9") == 450e9
    assert parse_flops("--flops", "1.2PFLOP/s") == 1.2e15


@pytest.mark.parametrize("text", ["", "GiB", "80GiBs", "80gb", "-1GB", "1.2.3GB", "nan", "0GB", "80GB/s"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--hbm='.*' must be"):
        parse_bytes("--hbm", text)


@pytest.mark.parametrize("text", ["400Gb/s", "50GB", "50GB/h"])
def test_bits_and_plain_sizes_are_no_rate(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--inter='.*' must be bytes a second such as 450GB/s"):
        parse_rate("--inter", text)
