"""What looks on while the data are made."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
# What every process does, where the rest is done by one while the others wait.
READING_FILES = "reading the bytes of files"

# Called often with what is being done, how much of it is done, and how much there is (0: not known). It may raise to
# end the work.
Watch = Callable[[str, int, int], None]


def unwatched(work: str, done: int, total: int) -> None:
    """Ignore the progress that is reported."""


def watched(work: str, items: Sequence[T], watch: Watch) -> Iterator[T]:
    """Yield the items one after another, and report before each how many are done."""
    for number, item in enumerate(items):
        watch(work, number, len(items))
        yield item
