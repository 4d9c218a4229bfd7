"""`malora launch follow` beside a log that grows and a job that changes. tests/slurm has a real Slurm."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from malora_dist.cli.cluster import follow_command
from malora_dist.cli.cluster.follow_command import Tail
from malora_dist.files.exit_status import FAILED, FINISHED, PREEMPTED, clear_exit_status, write_exit_status
from malora_dist.launch.restarts import begin
from tests.cli.cluster.submitted import job, launch, submitted
from tests.launch.run_folders import begun, steps
from tests.launch.slurm_clients import NO_CONTROLLER, Clients, make_clients

pytestmark = pytest.mark.e2e


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """Of the folder in which the command is then called, and looks often."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(follow_command, "LOG_SECONDS", 0.02)
    for name in ("STATE_SECONDS", "OWN_STATE_SECONDS"):
        monkeypatch.setattr(follow_command, name, 0.1)
    return make_clients(tmp_path / "bin", monkeypatch)


class Written:
    """What the command prints, for another thread that waits for it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.text = capsys, ""

    def wait(self, words: str) -> None:
        until = time.monotonic() + 200
        while words not in self.text:
            assert time.monotonic() < until, f"{words!r} is not in\n{self.text}"
            self.text += self.capsys.readouterr().out
            time.sleep(0.02)


def followed(run: Path, capsys: pytest.CaptureFixture[str], events: Callable[[Written], None]) -> tuple[int, str]:
    """Exit code and output of following while `events` happen."""
    written, failed, over = Written(capsys), [], threading.Event()

    def happen() -> None:
        try:
            events(written)
        except BaseException as error:
            failed.append(error)
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=happen)
    thread.start()
    code = launch("follow", str(run))
    over.set()
    thread.join()
    if failed:
        raise failed[0]
    return code, written.text + capsys.readouterr().out


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_job_from_its_queue_over_a_requeue_to_its_end(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted(Path("runs/a"), job("1", Path("runs/a")))
    log = Path(job("1", run).log)
    clients.say("squeue", "1|PENDING|Resources\n")

    def events(written: Written) -> None:
        written.wait("-- job 1: pending (waits for free nodes); run waiting to start\n")
        add(log, "first start\n")
        begun(run, *steps(1, 10))
        begin(run, "1")
        clients.say("squeue", "1|RUNNING|None\n")
        written.wait("-- job 1: running; run running, step 10/100, 0:03:00 left\n")
        write_exit_status(run, PREEMPTED, 75, reason="SIGUSR1", step=12, checkpoint=None)
        clients.say("squeue", "1|COMPLETING|None\n")
        written.wait("-- job 1: completing; run preempted, step 12/100\n")
        clients.say("squeue", "1|PENDING|BeginTime\n")
        written.wait("-- job 1: pending (starts after a pause); run preempted")
        clear_exit_status(run)
        clients.say("squeue", "1|RUNNING|None\n")
        add(log, "second start\n")
        written.wait("second start\n")
        add(log, "the last ")
        write_exit_status(run, FINISHED, 0, reason="", step=100, checkpoint=None)
        clients.say("squeue", "1|COMPLETED|None\n")
        add(log, "word\n")

    code, text = followed(run, capsys, events)
    assert code == 0
    assert text.index("first start\n") < text.index("completing") < text.index("second start\n")
    assert "\n-- job 1: completed; run finished, step 100/100\n" in text and "word\n" in text


@pytest.mark.parametrize("state", ["FAILED|NonZeroExitCode", "CANCELLED|None", "TIMEOUT|TimeLimit", "NODE_FAIL|None"])
def test_a_job_that_ends_otherwise(clients: Clients, capsys: pytest.CaptureFixture[str], state: str) -> None:
    run = submitted(begun(Path("a")), job("1", Path("a")))
    clients.say("squeue", f"1|{state}\n")
    assert launch("follow", "a") == 1
    assert f"-- job 1: {state.split('|')[0].lower().replace('_', ' ')}" in capsys.readouterr().out
    assert not (run / "slurm" / "train_1.out").exists()


def test_a_job_that_is_requeued_has_ended_for_a_moment(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted(begun(Path("a")), job("1", Path("a")))
    clients.say("squeue", "1|NODE_FAIL|None\n")

    def events(written: Written) -> None:
        written.wait("node fail")
        clients.say("squeue", "1|PENDING|BeginTime\n")
        written.wait("pending")
        clients.say("squeue", "1|COMPLETED|None\n")

    follow_command.OWN_STATE_SECONDS = 1.0
    code, text = followed(run, capsys, events)
    assert (code, "completed" in text) == (0, True)


@pytest.mark.parametrize(("outcome", "code"), [(FINISHED, 0), (FAILED, 1)])
def test_a_slurm_that_does_not_answer_is_asked_again(
    clients: Clients, capsys: pytest.CaptureFixture[str], outcome: str, code: int
) -> None:
    run = submitted(begun(Path("a")), job("1", Path("a")))
    clients.say("squeue", error=NO_CONTROLLER, code=1)

    def events(written: Written) -> None:
        written.wait("-- job 1: unknown (squeue: ")
        asked = len(clients.calls)
        while len(clients.calls) < asked + 4:
            time.sleep(0.02)
        write_exit_status(run, outcome, code, reason="", step=1, checkpoint=None)

    assert followed(run, capsys, events)[0] == code


@pytest.mark.parametrize(("outcome", "code"), [(FINISHED, 0), (None, 1)])
def test_a_job_that_slurm_has_forgotten(clients: Clients, outcome: str | None, code: int) -> None:
    run = submitted(begun(Path("a")), job("1", Path("a")))
    if outcome:
        write_exit_status(run, outcome, 0, reason="", step=1, checkpoint=None)
    assert launch("follow", "a") == code


def test_a_run_without_jobs_by_its_own_log(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(Path("by-hand"))
    add(run / "train.log", "".join(f"line {number}\n" for number in range(1, 31)))

    def events(written: Written) -> None:
        written.wait("line 30\n")
        add(run / "train.log", "more\n")
        written.wait("more\n")
        write_exit_status(run, FAILED, 1, reason="loss is nan", step=4, checkpoint=None)

    code, text = followed(run, capsys, events)
    assert code == 1 and clients.calls == []
    assert "line 11\n" in text and "line 10\n" not in text, "it begins with the last 20 lines"


def test_a_task_of_an_array(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    array = job("7", Path("a"), array="1-2", log=str(Path("a/slurm/train_7_%a.out").resolve()))
    run = submitted(Path("a"), array)
    begun(run / "seed-2")
    (run / "slurm" / "train_7_2.out").write_text("its log\n")
    clients.say("squeue", "7_2|COMPLETED|None\n")
    assert launch("follow", "a/seed-2") == 0
    assert "its log\n" in capsys.readouterr().out
    assert launch("follow", "a") == 2
    assert "a holds the runs of an array: seed-1, seed-2; follow one of them" in capsys.readouterr().err


def test_ctrl_c_ends_the_following_and_not_the_job(clients: Clients) -> None:
    run = submitted(begun(Path("a")), job("1", Path("a")))
    Path(job("1", run).log).write_text("its log\n")
    clients.say("squeue", "1|RUNNING|None\n")
    command = [sys.executable, "-m", "malora_dist.cli", "launch", "follow", "a"]
    # In the background of a shell, where tests may run, Ctrl-C is ignored.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hears)
    assert process.stdout is not None
    heard = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(200) == 130
    assert heard[0].startswith("-- job 1: running") and heard[1] == "its log\n"
    assert rest == "\nno longer following; job 1 continues (scancel 1 cancels it)\n"
    assert [call.split()[0] for call in clients.calls] == ["squeue"]


def test_what_is_new_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path, lines=2)
    assert tail.read() == ""
    path.write_bytes("one\ntwo\nthree €"[:-1].encode() + "€".encode()[:2])
    assert tail.read() == "two\nthree "
    with path.open("ab") as file:
        file.write("€".encode()[2:] + b"\n")
    assert (tail.read(), tail.read()) == ("€\n", "")
    path.write_text("new\n")
    assert tail.read() == "new\n"
