"""What a run says: plain lines in the log, errors on stderr, nothing from other ranks, and how long it still takes."""

import logging
import os
import pty
import re
import time
from collections.abc import Iterator
from pathlib import Path
from select import select

import psutil
import pytest
import torch

from malora_dist.engine.progress import LOGGER, Bar, peak_memory_gib, start_logging, time_left
from tests.processes import start, wait


def run_on_a_terminal(log: Path) -> None:
    """Three steps of a run that logs to the file, each with a line of its own."""
    start_logging(log)
    with Bar("training", 3, True) as bar:
        for step in range(1, 4):
            logging.getLogger(LOGGER).info("step %d said", step)
            bar.update(step)
            time.sleep(0.3)


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def say_both() -> None:
    logging.getLogger(LOGGER).info("a step")
    logging.getLogger(LOGGER).error("a mistake")


def test_main_rank_says_everything_and_errors_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(tmp_path / "train.log")
    start_logging(tmp_path / "train.log")  # a second run in the same process must not say everything twice
    say_both()
    out, err = capsys.readouterr()
    assert out.count("a step") == 1 and "a mistake" not in out
    assert err == "a mistake\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO a step", "ERROR a mistake"]


def test_other_ranks_say_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(None)
    say_both()
    assert capsys.readouterr() == ("", "a mistake\n")


def test_a_bar_in_a_file_is_a_line_every_half_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(tmp_path / "train.log")
    for active in (True, False):
        with Bar("evaluating", 1, active) as bar:
            bar.update(1, 8)
            bar.said -= 31
            bar.update(2, 8)
            bar.update(3, 8)
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["evaluating: 2 of 8"]


@pytest.mark.distributed
def test_on_a_terminal_lines_stand_above_a_bar_and_the_log_stays_plain(tmp_path: Path) -> None:
    main, other = pty.openpty()
    run = start(
        "tests.engine.test_progress:run_on_a_terminal",
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


def test_time_left_goes_by_the_steps_done() -> None:
    assert time_left(time.monotonic() - 10_000.2, 100, 200) == "2:46:40"
    assert time_left(time.monotonic() - 3501, 7000, 7002) == "0:00:01"
    assert time_left(time.monotonic(), 0, 5) == "0:00:00"


def test_peak_memory_sees_what_was_held_for_a_moment() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    held = psutil.Process().memory_info().rss / 2**30
    assert held <= before + 0.01 < 64
    block = bytearray(int((before - held + 0.2) * 2**30))
    del block
    assert before + 0.15 <= peak_memory_gib(torch.device("cpu")) < before + 0.4
