"""Standard output and error that never decide how a run ends: they take any text, and outlive whoever reads them.

A terminal may know fewer characters than a table of results has, `head` may close the pipe, a disk may be full, and a
service may start us without any output at all. What cannot be shown is shown otherwise, or not.
"""

import codecs
import io
import os
import select
import sys
from typing import TextIO, cast

# How a terminal without these characters shows them. Others become \xe4, \u4e16 and the like.
SPELLED = {
    "±": "+-",
    "–": "-",
    "—": "-",
    "−": "-",
    "→": "->",
    "…": "...",
    "×": "x",
    "·": "|",
    "“": '"',
    "”": '"',
    "’": "'",
}
SPELL = "malora_dist.spell"


def forgive_output() -> None:
    """Make sys.stdout and sys.stderr such streams; once done, they stay as they are."""
    codecs.register_error(SPELL, _spell)
    _occupy_standard_files()
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != SPELL:
            # A stream that another program has set, such as a notebook's, still writes where it wrote before.
            setattr(sys, name, _forgiving(stream) if stream is own else stream)
            getattr(sys, name).reconfigure(errors=SPELL)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether somebody sees the stream at once. A service may have none, or a closed one."""
    return stream is not None and not stream.closed and stream.isatty()


class _Forgiving(io.FileIO):
    """A file that takes whatever it is given, also what cannot be written any more."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        rest = memoryview(data)
        try:
            while len(rest):
                written: int | None = super().write(rest)
                if written is None:
                    # A full non-blocking pipe, as node and ssh make them: wait until there is room.
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError:
            pass
        return len(data)


def _forgiving(stream: io.TextIOWrapper) -> TextIO:
    raw = _Forgiving(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        # Unbuffered, as python -u asks for, or a line at a time.
        raw if stream.write_through else io.BufferedWriter(cast(io.RawIOBase, raw)),
        encoding=stream.encoding,
        errors=SPELL,
        line_buffering=True,
        write_through=stream.write_through,
    )


def _spell(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    plain = "".join(SPELLED.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in text)
    return plain, error.end


def _occupy_standard_files() -> None:
    """Give files 0 to 2 a place: what is opened next would take it, and get what C libraries say."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is given. Launchers that we start have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
