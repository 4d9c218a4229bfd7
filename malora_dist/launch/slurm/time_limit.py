"""Slurm's way of writing durations: those of a time limit, and those that squeue prints."""

import re

from malora_dist.errors import ConfigError

FORMS = re.compile(r"((?P<days>\d+)-)?(?P<clock>\d+(:\d+){0,2})")


def limit_seconds(text: str) -> int | None:
    """Return the seconds of MINUTES, M:S, H:M:S, DAYS-H, DAYS-H:M or DAYS-H:M:S; None for no limit.

    Raises ConfigError for anything else.

    >>> limit_seconds("90"), limit_seconds("1:30"), limit_seconds("1-2:03")
    (5400, 90, 93780)
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = FORMS.fullmatch(text)
    if found is None:
        raise ConfigError(f"--time={text}: must be minutes, hours:minutes:seconds, or days-hours:minutes:seconds")
    parts = [int(part) for part in found["clock"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return 86400 * int(found["days"] or 0) + 3600 * hours + 60 * minutes + seconds


def check_save_before(time: str, save_before: int) -> None:
    """Raise ConfigError if a run would be signalled to save as soon as it starts, again and again."""
    limit = limit_seconds(time)
    if limit is not None and save_before >= limit:
        raise ConfigError(
            f"--save-before={save_before} must be less than the {limit} seconds of --time={time}; the run would "
            "be told to save and end as soon as it starts"
        )


def seconds_left(text: str) -> float | None:
    """Return the seconds in squeue's [days-][[hours:]minutes:]seconds; None for UNLIMITED, INVALID and the like.

    >>> seconds_left("1-02:03:04")
    93784.0
    """
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return float(seconds + 86400 * int(days or 0))
