"""How a rank ends: exit codes, who speaks, and two real processes of which one fails."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from malora_dist.console.log import LOGGER
from malora_dist.distributed.process_groups import start_processes, sum_over_processes
from malora_dist.errors import CheckpointError, ConfigError, DataError, TopologyError, TrainingError
from malora_dist.launch.ranks import LAUNCHED
from malora_dist.training import process
from malora_dist.training.process import run_as_process
from tests.processes import start_ranks, wait

TIMEOUT = 20


@pytest.fixture(autouse=True)
def no_logging() -> Iterator[None]:
    """Errors go to stderr while no run has opened its log."""
    logger = logging.getLogger(LOGGER)
    before, logger.handlers = logger.handlers, []
    yield
    logger.handlers = before


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """This process as one of two ranks, or alone for None."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if request.param is not None:
        for name, value in zip(LAUNCHED, (str(request.param), "2", str(request.param), "n0", "7"), strict=True):
            monkeypatch.setenv(name, value)
    # Otherwise a launched rank would end this process.
    monkeypatch.setattr(os, "_exit", lambda code: None)


def fail(error: Exception) -> int:
    def work() -> None:
        raise error

    return run_as_process(work)


@pytest.mark.parametrize("rank", [None], indirect=True)
@pytest.mark.parametrize(
    "error, code", [(ConfigError, 2), (DataError, 2), (TopologyError, 2), (TrainingError, 1), (CheckpointError, 1)]
)
def test_an_error_for_people_is_its_message_and_no_traceback(
    rank: None, capsys: pytest.CaptureFixture[str], error: type[Exception], code: int
) -> None:
    assert fail(error("train.max_steps=0 must be positive")) == code
    assert capsys.readouterr().err == "train.max_steps=0 must be positive\n"


@pytest.mark.parametrize("rank", [0], indirect=True)
def test_an_unexpected_error_comes_with_its_traceback(rank: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(KeyError("lost")) == 1
    said = capsys.readouterr().err
    assert said.startswith("[rank 0] Traceback") and said.rstrip().endswith("KeyError: 'lost'")


@pytest.mark.parametrize("rank, patience", [(0, 3600.0), (1, 0.5)], indirect=["rank"])
def test_the_main_rank_speaks_first(
    rank: None, patience: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others wait, so that a launcher does not end the main rank unheard because of them, but do speak in the end."""
    monkeypatch.setattr(process, "PATIENCE_SECONDS", patience)
    started = time.monotonic()
    assert fail(ConfigError("no")) == 2
    assert os.environ["RANK"] == "0" or time.monotonic() - started >= patience
    assert capsys.readouterr().err == f"[rank {os.environ['RANK']}] no\n"


@pytest.mark.distributed
def test_two_processes_end_together_well_or_not(tmp_path: Path) -> None:
    """One that fails ends the other, be it in the middle of its work or done with it; nobody hangs."""
    logs = {what: [tmp_path / f"{what}{rank}" for rank in (0, 1)] for what in ("succeeds", "fails", "fails late")}
    ranks = {what: start_ranks("tests.training.test_process:be_a_rank", [what], logs[what]) for what in logs}
    codes = {what: wait(ranks[what]) for what in logs}
    said = {what: [log.read_text() for log in logs[what]] for what in logs}
    assert codes == {"succeeds": [0, 0], "fails": [1, 1], "fails late": [1, 1]}, said
    assert all("still here" in text and "[rank" not in text for text in said["succeeds"])
    for what in ("fails", "fails late"):
        main, other = said[what]
        assert "[rank 1] Traceback" in other and "ValueError: only rank 1 finds this" in other
        assert "still here" not in other and other.count("[rank") == 1
        # No traceback of the main rank buries the first error.
        assert "[rank 0] timed out waiting for another process" in main and "Traceback" not in main, main


def be_a_rank(what: str) -> int:
    """Train nothing, but start, meet the other rank and end as training does."""

    def work() -> None:
        world = start_processes(TIMEOUT)
        assert float(sum_over_processes(torch.ones(()))) == world.size
        if what != "succeeds" and world.rank == 1:
            raise ValueError("only rank 1 finds this")
        print("still here", flush=True)
        if what != "fails late":
            sum_over_processes(torch.ones(()))

    return run_as_process(work)
