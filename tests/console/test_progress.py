"""Silence at first, then a bar on a terminal, and lines elsewhere."""

import logging
import os
import pty
import re
import sys
import time
from pathlib import Path
from select import select

import pytest

from malora_dist.console.log import LOGGER, start_logging
from malora_dist.console.progress import Bar, tracked
from tests.processes import start, wait


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless it is set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_what_is_done_in_a_moment_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("reading", 3) as bar:
        clock[0] += 1.9
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_without_a_log_lines_go_to_stderr(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("task a: reading") as bar:
        for done in range(1, 37):
            clock[0] += 1
            bar.update(1000 * done)
        clock[0] += 30
        bar.update(5, 9, "task a: tokenising")
        clock[0] += 30
        bar.update(8)
        clock[0] += 30
        bar.update(7, 0, "task b: reading")
    lines = ["task a: reading: 2,000", "task a: reading: 32,000", "task a: tokenising: 5 of 9"]
    lines += ["task a: tokenising: 8 of 9", "task b: reading: 7"]
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines))


def test_a_reader_that_is_gone_ends_no_work(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with Bar("reading") as bar:
        clock[0] += 9
        bar.advance()
    assert bar.done == 1


@pytest.mark.parametrize("closed", [True, False])
def test_a_service_without_output_works_on(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: bool
) -> None:
    for name in ("stdout", "stderr"):
        stream = (tmp_path / name).open("w") if closed else None
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    for after in (2, 0):
        with Bar("reading", after=after) as bar:
            clock[0] += 99
            bar.update(3)
        assert bar.done == 3 and bar.progress is None


def test_items_are_counted_as_they_are_taken(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for item in tracked("writing", "abc"):
        clock[0] += 1.5
        assert item in "abc"
    assert capsys.readouterr().err == "writing: 2 of 3\n"


def test_in_a_log_a_line_every_half_minute(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger(LOGGER)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    start_logging(tmp_path / "train.log")
    for active in (True, False):
        with Bar("training", 8, active, after=0) as bar:
            bar.update(1)
            clock[0] += 31
            bar.update(2)
            bar.update(3)
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["training: 2 of 8"]


def run_on_a_terminal(log: Path) -> None:
    """Three steps of a run that logs to the file, each with a line of its own."""
    start_logging(log)
    with Bar("training", 3, after=0) as bar:
        for step in range(1, 4):
            logging.getLogger(LOGGER).info("step %d said", step)
            bar.update(step)
            time.sleep(0.3)


@pytest.mark.distributed
def test_on_a_terminal_lines_stand_above_a_bar_and_the_log_stays_plain(tmp_path: Path) -> None:
    main, other = pty.openpty()
    run = start(
        "tests.console.test_progress:run_on_a_terminal",
        [tmp_path / "train.log"],
        Path(os.ttyname(other)),
        environment={"TERM": "xterm", "COLUMNS": "100"},
    )
    shown = b""
    while run.is_alive() or select([main], [], [], 0)[0]:
        if select([main], [], [], 0.1)[0]:
            shown += os.read(main, 4096)
    assert wait([run]) == [0], shown.decode()
    os.close(other)
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert all(words in text for words in ("training", "━", "3/3", "step 1 said", "step 2 said", "step 3 said")), text
    log = (tmp_path / "train.log").read_text()
    assert log.count("\n") == 3 and "\x1b" not in log
