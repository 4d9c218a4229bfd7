"""What a run says: plain lines in the log, errors on stderr, nothing from other ranks, and how long it still takes."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from malora_dist.console.log import LOGGER, peak_memory_gib, start_logging, time_left


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
