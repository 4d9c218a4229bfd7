"""The hosts of a DeepSpeed hostfile, and those of them that a run uses."""

import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from malora_dist.errors import ConfigError

LINE = re.compile(r"(?P<host>\S+)(?:\s+slots=(?P<slots>\S+))?")
RULE = "a line is HOST slots=N, with N the number of its GPUs"

Slots = dict[str, tuple[int, ...]]


def read_hostfile(path: Path) -> dict[str, int]:
    """Return hosts and their numbers of slots, in the file's order.

    Raises ConfigError with the file, the line and the rule for a line that is none, and for a host that occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--hostfile={path} cannot be read: {reason}") from error
    lines: dict[str, int] = {}
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        host, slots = _entry(f"{path}:{number}: {line.strip()!r}", entry)
        if host in hosts:
            raise ConfigError(f"{path}:{number}: {host} has line {lines[host]} already; give all its slots there")
        hosts[host], lines[host] = slots, number
    if not hosts:
        raise ConfigError(f"--hostfile={path} names no host; {RULE}")
    _refuse_one_address(path, lines)
    return hosts


def choose_hosts(hosts: Mapping[str, int], include: str | None, exclude: str | None) -> Slots:
    """Return the slots that take part, by host, in the hostfile's order.

    `include` and `exclude` are deepspeed's: `HOST@HOST:0,2`, a host without numbers being all of it. Raises ConfigError
    if both are given, for hosts and slots that are not in `hosts`, and if nothing is left.
    """
    every = {host: tuple(range(slots)) for host, slots in hosts.items()}
    if include and exclude:
        raise ConfigError(f"--include={include} and --exclude={exclude}: give one of them")
    if include:
        named = _named("--include", include, every)
        return {host: named[host] for host in hosts if host in named}
    if not exclude:
        return every
    gone = _named("--exclude", exclude, every)
    left = {host: tuple(slot for slot in slots if slot not in gone.get(host, ())) for host, slots in every.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ConfigError(f"--exclude={exclude} leaves none of the hostfile's slots")
    return left


def slots_per_host(chosen: Slots) -> int:
    """Return the number of processes of each host. Raises ConfigError, with the hosts that differ, if they do."""
    counts = {host: len(slots) for host, slots in chosen.items()}
    ((most, _),) = Counter(counts.values()).most_common(1)
    odd = [f"{host} has {count}" for host, count in counts.items() if count != most]
    if odd:
        rest = ", ".join(host for host, count in counts.items() if count == most)
        raise ConfigError(
            f"a run needs the same number of slots on each host: {', '.join(odd)}, not {most} as {rest}; "
            "change the hostfile, or choose equally many with --include"
        )
    return most


def addresses(host: str) -> set[str]:
    """Return the addresses of a host, without a `user@` before it; none if only ssh knows its name."""
    try:
        found = socket.getaddrinfo(host.rpartition("@")[2], None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(address[0]) for *_, address in found}


def _entry(place: str, entry: str) -> tuple[str, int]:
    found = LINE.fullmatch(entry)
    if found is None or found["host"].startswith("slots="):
        raise ConfigError(f"{place}: {RULE}")
    slots = found["slots"]
    if slots is None:
        raise ConfigError(f"{place}: slots=N is missing; {RULE}")
    if not re.fullmatch("[0-9]{1,4}", slots) or int(slots) < 1:
        raise ConfigError(f"{place}: slots={slots} must be a whole number, at least 1 and at most 9999")
    return found["host"], int(slots)


def _refuse_one_address(path: Path, lines: Mapping[str, int]) -> None:
    """Raise ConfigError if two hosts have one address: two processes would get the same GPU."""
    seen: dict[str, str] = {}
    for host, number in lines.items():
        for address in sorted(addresses(host)):
            other = seen.setdefault(address, host)
            if other != host:
                raise ConfigError(
                    f"{path}:{number}: {host} is {other} of line {lines[other]} again, at {address}; keep one line"
                )


def _named(option: str, text: str, every: Mapping[str, Sequence[int]]) -> Slots:
    """Parse HOST@HOST:0,2 to slots by host. Raises ConfigError for what is not in `every`."""
    chosen: Slots = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in every:
            raise ConfigError(f"{option}={text}: {host!r} is not in the hostfile, which has {', '.join(every)}")
        if host in chosen:
            raise ConfigError(f"{option}={text}: {host} is named twice; write {host}:0,1,...")
        slots = [slot.strip() for slot in numbers.split(",")] if colon else [str(slot) for slot in every[host]]
        for slot in slots:
            if not re.fullmatch("[0-9]{1,4}", slot) or int(slot) not in every[host]:
                highest = len(every[host]) - 1
                raise ConfigError(f"{option}={text}: {slot!r} is not a slot of {host}, which has slots 0 to {highest}")
        chosen[host] = tuple(sorted({int(slot) for slot in slots}))
    return chosen
