"""A rank that dies, raises, sleeps or is a batch short ends the run on every rank, which says where it was."""

import os
import re
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from malora_dist.errors import ConfigError
from malora_dist.training import watchdog as watchdog
from malora_dist.training.watchdog import Watchdog, watched
from tests.e2e import RECIPE, deepspeed, launch, make_folder
from tests.processes import start_ranks, wait
from tests.training.hang_workers import GATE, UP

# How many ranks take part: four where groups of them matter.
CASES = {"sleeper": 4, "killed": 4, "ended": 2, "router": 4, "save": 2, "short": 4}
# Only the sleeper's fellows wait so long; in the other cases a busy machine has more time than it needs.
TIMEOUT, LONGEST = 30, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("hang"))
    recipe = {
        **RECIPE,
        "parallel": {"zero_stage": 3, "ep_size": 2, "timeout_seconds": LONGEST},
        "evaluation": {"base": False, "tuned": False},
    }
    recipe["train"] = recipe["train"] | {
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "eval_steps": None,
        "save_steps": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, list[tuple[int | str, str]]]:
    """Exit code and output of every rank in every case, one case after another; the sleeper sleeps meanwhile."""
    sleeping = start("sleeper", folder)
    codes = {case: wait(start(case, folder)) for case in CASES if case != "sleeper"}
    *others, sleeper = sleeping
    wait(others)
    # As a launcher does.
    sleeper.terminate()
    codes["sleeper"] = wait(sleeping)
    return {
        case: [(code, errors(folder / f"{case}.{rank}.log")) for rank, code in enumerate(codes[case])] for case in CASES
    }


def start(case: str, folder: Path) -> list[BaseProcess]:
    """The ranks of a case."""
    logs = [folder / f"{case}.{rank}.log" for rank in range(CASES[case])]
    timeout = TIMEOUT if case == "sleeper" else LONGEST
    arguments = ["recipe.yaml", "--output_dir", f"runs/{case}", "--parallel.timeout_seconds", str(timeout)]
    return start_ranks("tests.training.hang_workers:train", [case, arguments], logs, folder=folder)


def errors(log: Path) -> str:
    """What a rank said from its first error on."""
    text = log.read_text()
    return text[text.find("[rank") :] if "[rank" in text else ""


def lost(place: str) -> str:
    """The whole of a rank's last words, when another one is gone."""
    return rf"\[rank \d\] timed out waiting for another process \(rank \d {place}\): it failed, .*\n\Z"


@pytest.mark.distributed
@pytest.mark.slow("six runs on processes that fail, one of which is found after a timeout")
def test_a_killed_rank_ends_all(cases: dict[str, list[tuple[int | str, str]]]) -> None:
    *survivors, killed = cases["killed"]
    assert killed == (-9, "")
    for rank, (code, said) in enumerate(survivors):
        assert code == 1 and said.startswith(f"[rank {rank}] timed out waiting") and f"(rank {rank} " in said
        assert re.match(lost(r"at step 2, backward, near layer model\.layers\.\d\.[\w.]+_proj; [^;]+"), said), said


@pytest.mark.distributed
def test_a_rank_without_data_says_so_and_ends_all(cases: dict[str, list[tuple[int | str, str]]]) -> None:
    *others, ended = cases["ended"]
    assert ended == (1, "[rank 1] this process's training data ended before step 2\n  rank 1 at step 2, reading data\n")
    for code, said in others:
        assert code == 1 and re.match(lost("at step 2, counting tokens; all processes"), said), said


@pytest.mark.distributed
def test_the_rank_that_fails_explains_and_its_group_is_named(cases: dict[str, list[tuple[int | str, str]]]) -> None:
    *others, failed = cases["router"]
    assert failed[0] == 1 and failed[1].startswith("[rank 3] Traceback")
    assert failed[1].endswith(f"only this router fails\nrank 3 at step 2, forward, near layer {GATE}\n\n")
    for code, said in others:
        assert code == 1 and re.match(lost("at step 2, (?:for|back)ward, near layer [^;]+; [^;]+"), said), said
    assert f"near layer {GATE}; expert-parallel group [2, 3], phase counts)" in others[2][1]


@pytest.mark.distributed
def test_a_full_disk_on_the_main_rank_is_an_error_on_all(cases: dict[str, list[tuple[int | str, str]]]) -> None:
    for rank, (code, said) in enumerate(cases["save"]):
        assert code == 1 and re.fullmatch(
            rf"\[rank {rank}\] runs/save/checkpoints/\.step-000002\.partial/.* cannot be written: File too large\n"
            rf"  rank {rank} at step [23], .*\n(  met by rank 0\n)?",
            said,
        ), said


@pytest.mark.distributed
def test_a_rank_one_batch_short_is_an_error_on_all(cases: dict[str, list[tuple[int | str, str]]]) -> None:
    for rank, (code, said) in enumerate(cases["short"]):
        assert code == 1 and said == (
            f"[rank {rank}] step 2 needs the same number of micro-batches on every process; there are 1 on rank 3, "
            f"2 on rank 0 1 2\n  rank {rank} at step 2, counting tokens\n"
        )


@pytest.mark.distributed
def test_a_sleeping_rank_is_given_up_and_says_where_it_sleeps(cases: dict[str, list[tuple[int | str, str]]]) -> None:
    *others, sleeper = cases["sleeper"]
    for code, said in others:
        *_, stuck, gave_up = said.splitlines(keepends=True)
        assert code == 1 and "no progress for " in stuck and f"Timed out waiting {TIMEOUT}000ms" in gave_up, said
        assert re.match(lost("at step 2, (?:for|back)ward, near layer [^;]+; [^;]+"), gave_up), said
    assert f"near layer {UP}; expert-parallel group [2, 3], phase returns)" in others[2][1]
    *_, stuck, told = sleeper[1].splitlines()
    assert sleeper[0] == 128 + 15 and f"at step 2, forward, near layer {UP}, in sleep_long (" in stuck
    assert told.startswith("[rank 3] received SIGTERM") and told.endswith(f"at step 2, forward, near layer {UP}")


@pytest.mark.e2e
@pytest.mark.slow("a real launcher")
def test_a_killed_rank_ends_the_launch(folder: Path) -> None:
    """The launcher ends the other rank within a second, which still says where it was."""
    arguments = ["killed", "recipe.yaml", "--output_dir", "runs/launched"]
    done = launch(deepspeed(2, "tests.training.hang_workers", *arguments), folder)
    assert done.code != 0 and "Traceback" not in done.output, done.output
    (said,) = re.findall(r"\[rank 0\] .*", done.output)
    assert re.search(r"timed out waiting|received SIGTERM", said) and "at step 2, backward, near layer model" in said


def test_the_watch_speaks_once_about_a_place_and_only_when_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(watchdog, "log_error", said.append)
    here, before = Watchdog(rank=5), signal.getsignal(signal.SIGTERM)
    with watched(here, 2):
        time.sleep(2.5)  # not in a phase yet
        here.mark_phase("forward", 7)
        for layer in range(25):
            here.mark_layer(f"layers.{layer}")
            time.sleep(0.1)
        assert said == []
        while not said:
            time.sleep(0.1)
        time.sleep(1)
        assert len(said) == 1 and "at step 7, forward, near layer layers.24, in test_the_watch_speaks_once" in said[0]
    assert signal.getsignal(signal.SIGTERM) == before
    assert "watch" not in [thread.name for thread in threading.enumerate()]


def test_a_signal_to_a_forked_child_is_not_taken_for_the_parents() -> None:
    with watched(Watchdog(), 2):
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begun, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.2)
    os.close(ready)
    os.close(begun)


def test_a_fork_after_the_watch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fork of a process calls what was registered, for good: a second watch registers nothing."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: heard.append(number))
    try:
        for _ in range(2):
            with watched(Watchdog(), 2, lambda _number: None):
                monkeypatch.setattr(os, "register_at_fork", lambda **_: pytest.fail("registered again"))
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGUSR1)
            os._exit(len(heard))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_mistake_found_before_the_first_step_needs_no_place() -> None:
    for error, notes in ((ConfigError("no"), []), (OSError("no"), ["rank 1 at step 0, loading the base model"])):
        here = Watchdog(rank=1)
        with pytest.raises(type(error)) as caught, watched(here, 2):
            here.mark_phase("loading the base model")
            raise error
        assert getattr(caught.value, "__notes__", []) == notes
