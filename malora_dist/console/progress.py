"""Progress of work that takes longer than a moment: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from malora_dist.console.log import LOGGER
from malora_dist.console.terminal import is_terminal

PATIENCE, BETWEEN_LINES = 2.0, 30.0

T = TypeVar("T")


class Bar(AbstractContextManager["Bar"]):
    """Shows how far a work is once it has taken `after` seconds; nothing if it is not `active`, as on other ranks.

    On a terminal it is a bar; elsewhere a line in the log, or on stderr where no log has been started, and another one
    every half minute. With after=0 the bar is there at once, and the first line after half a minute.
    """

    def __init__(self, title: str, total: int | None = None, active: bool = True, *, after: float = PATIENCE) -> None:
        self.title, self.done, self.total, self.active, self.after = title, 0, total, active, after
        self.started = time.monotonic()
        self.next_line = self.started + (after or BETWEEN_LINES)
        self.progress: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> "Bar":
        if self.after == 0:
            self._show_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def advance(self, *_: object) -> None:
        """Count one more as done."""
        self.update(self.done + 1)

    def update(self, done: int, total: int | None = None, title: str | None = None) -> None:
        """Set how many are done, of a total that may be known only now; another title begins another bar."""
        if title is not None and title != self.title:
            self._begin(title, total)
        self.done, self.total = done, total or self.total
        now = time.monotonic()
        if self.active and self.progress is None and now >= self.started + self.after:
            self._show_bar()
        if self.progress is not None:
            self.progress.update(self.task, completed=done, total=self.total)
        elif self.active and now >= self.next_line:
            self.next_line = now + BETWEEN_LINES
            log_line(f"{self.title}: {done:,}" + (f" of {self.total:,}" if self.total else ""))

    def _begin(self, title: str, total: int | None) -> None:
        self.title, self.total = title, total or None
        if self.progress is not None:
            self.progress.remove_task(self.task)
            self.task = self.progress.add_task(title, total=self.total)

    def _show_bar(self) -> None:
        if not self.active or not is_terminal(sys.stdout):
            return
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task(self.title, total=self.total, completed=self.done)
        self.progress.start()


def log_line(line: str) -> None:
    """Write a line to the log, or to stderr where no log has been started."""
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        logger.info("%s", line)
    else:
        # Work goes on without a reader.
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def tracked(title: str, items: Iterable[T], total: int | None = None, active: bool = True) -> Iterator[T]:
    """Give the items one after another, and show how many of them have been taken."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(title, total, active) as bar:
        for item in items:
            yield item
            bar.advance()
