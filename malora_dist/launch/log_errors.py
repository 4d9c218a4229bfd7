"""The line of a log that says why a job failed."""

import re
from collections.abc import Iterator
from pathlib import Path

# Read from the end of a log: room for the messages of thousands of ranks about one failure.
TAIL_BYTES = 2**20
LONGEST = 300
# Prefixes that name the process of a line: of srun --label, torchrun's --tee, and torch.
SPEAKER = re.compile(r"^(?:\d+: )?(?:\[(?!rank)[a-z_]+\d+\]:)?(?:\[rank\d+\]: ?)?")
# Time and level of a line of train.log; the rank of a message.
LEVEL = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) ")
RANK = re.compile(r"^\[rank \d+\] ")
TRACEBACK = "Traceback (most recent call last):"
# Printed by `malora launch begin` at each start of a job.
START = re.compile(r"^job \S+, start \d+: ")
TOLD = re.compile(
    r"slurmstepd\S*: error: |srun: error: |out of memory|CUDA error|NCCL error|Watchdog caught|Segmentation fault|"
    r"Bus error|No space left on device|: command not found",
    re.IGNORECASE,
)
NO_ERROR = re.compile(r"DUE TO JOB REQUEUE")
# Messages of other processes, which follow from a failure and are not its cause.
CONSEQUENCE = re.compile(
    r"(gave up|timed out) waiting for another process|Exited with exit code|tasks? [\d,-]+: Terminated|"
    r"ChildFailedError|"
    r"\*\*\* STEP \S+ ON \S+ CANCELLED AT \S+ \*\*\*|SignalException|Watchdog caught|DistNetworkError"
)


def last_error(log: Path) -> str | None:
    """Return the line of a log with the error, of the latest start that has one; None without one.

    A cause is preferred to what other processes report of it, of which the first is nearest to the cause. Also None
    if the log cannot be read.
    """
    for lines in reversed(_starts(_tail(log))):
        errors = list(_errors(lines))
        causes = [error for error in errors if not CONSEQUENCE.search(error)]
        if errors:
            return (causes[-1] if causes else errors[0])[:LONGEST]
    return None


def last_line(log: Path) -> str | None:
    """Return the last line that is not empty; None without one."""
    lines = [line.strip() for line in _tail(log) if line.strip()]
    return lines[-1][:LONGEST] if lines else None


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _starts(lines: list[str]) -> list[list[str]]:
    """Split a log into the lines of each start of the job."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if START.match(line):
            parts.append([])
        parts[-1].append(line)
    return parts


def _errors(lines: list[str]) -> Iterator[str]:
    within: set[str] = set()  # speakers in the middle of a traceback
    for line in lines:
        speaker = _matched(SPEAKER, line)
        text = line[len(speaker) :].rstrip()
        level = LEVEL.match(text)
        text = text[level.end() :] if level else text
        rank = _matched(RANK, text)
        text = text.removeprefix(rank)
        if text.strip() == TRACEBACK:
            within.add(speaker)
        elif speaker in within:
            # Empty lines and indented ones are its frames and code.
            if text and not text[0].isspace():
                within.discard(speaker)
                yield text
        elif rank or (level and level["level"] == "ERROR") or (TOLD.search(text) and not NO_ERROR.search(text)):
            yield text


def _matched(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.match(text)
    return match[0] if match else ""
