"""Sizes and rates as people write them: 80GiB, 450GB/s, 400TFLOP/s."""

import re

from malora_dist.errors import ConfigError

SI = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
GIB = 2**30


def parse_bytes(option: str, text: str) -> int:
    """Parse a size such as 80GiB or 80e9, in bytes. Raises ConfigError naming the option.

    >>> parse_bytes("--hbm", "80GiB")
    85899345920
    """
    return int(_parse(option, text, "B", "a size such as 80GiB or 40GB"))


def parse_rate(option: str, text: str) -> float:
    """Parse a rate such as 450GB/s, in bytes per second. Bits (Gb/s) are refused. Raises ConfigError naming the option.

    >>> parse_rate("--inter", "50GB/s")
    50000000000.0
    """
    return _parse(option, text, "B/s", "bytes a second such as 450GB/s (400 Gb/s are 50GB/s)")


def parse_flops(option: str, text: str) -> float:
    """Parse a rate such as 400TFLOP/s, in operations per second. Raises ConfigError naming the option."""
    return _parse(option, text, "FLOP/s", "a rate such as 400TFLOP/s")


def _parse(option: str, text: str, unit: str, rule: str) -> float:
    prefixes = SI | BINARY if unit != "FLOP/s" else SI
    number = r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)"
    match = re.fullmatch(rf"\s*{number}\s*([A-Za-z]{{0,2}}?)({unit})?\s*", text)
    if match is None or match[2] not in prefixes:
        raise ConfigError(f"{option}={text!r} must be {rule}")
    value = float(match[1]) * prefixes[match[2]]
    if value <= 0:
        raise ConfigError(f"{option}={text!r} must be above 0")
    return value


def show_bytes(number: float) -> str:
    """Format bytes with at most four digits and a binary unit.

    >>> [show_bytes(n) for n in (0, 1023, 3.9e9, 85899345920)]
    ['0', '1023 B', '3.63 GiB', '80 GiB']
    """
    if number < 1024:
        return f"{number:.0f} B" if number else "0"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        number /= 1024
        if number < 1024 or unit == "TiB":
            break
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def show_seconds(seconds: float) -> str:
    """Format a time in seconds or milliseconds with three digits.

    >>> [show_seconds(s) for s in (0.0123, 3.2, 75)]
    ['12.3 ms', '3.2 s', '75 s']
    """
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
