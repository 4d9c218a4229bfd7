"""The rules of this suite: a unit test starts no process, a slow test says why, a module stays on one worker.

And its processes: they are waited for as long as they work, and end with the one that started them.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.patience import Patience
from tests.processes import ROOT, start, wait
from tests.tiers import ByModule

pytest_plugins = ["pytester"]

PROCESS = """
import subprocess, sys, pytest

@pytest.fixture(scope="module")
def started():
    subprocess.run([sys.executable, "-c", ""], check=True)

{mark}
def test_one(started):
    pass
"""
SLEEP = """
import time, pytest

@pytest.fixture
def prepared():
    time.sleep(0.2)

{mark}
def test_one(prepared):
    time.sleep(0.2)
"""


def run(pytester: pytest.Pytester, test: str, slow_seconds: float = 0) -> tuple[int, str]:
    """How many of the tests of a module pass, and what is said."""
    pytester.makepyfile(test)
    done = pytester.runpytest_inprocess("-p", "tests.tiers", "-p", "tests.limits", "-o", f"slow_seconds={slow_seconds}")
    return done.parseoutcomes().get("passed", 0), done.stdout.str()


@pytest.mark.parametrize("tier", ["distributed", "e2e", "slurm"])
@pytest.mark.e2e
def test_a_test_that_starts_a_process_says_so(pytester: pytest.Pytester, tier: str) -> None:
    passed, said = run(pytester, PROCESS.format(mark=""))
    assert passed == 0 and "a unit test starts no process" in said and "-c" in said
    assert run(pytester, PROCESS.format(mark=f"@pytest.mark.{tier}"))[0] == 1


@pytest.mark.parametrize("mark, passes, words", [
    ("", 0, "more than slow_seconds=0.3: make it faster or mark it"),
    ("@pytest.mark.slow", 0, "the mark `slow` says why"),
    ("@pytest.mark.slow('it sleeps')", 1, "1 passed"),
])  # fmt: skip
def test_a_slow_test_says_why(pytester: pytest.Pytester, mark: str, passes: int, words: str) -> None:
    """Preparing it counts."""
    passed, said = run(pytester, SLEEP.format(mark=mark), slow_seconds=0.3)
    assert passed == passes and words in said


def test_without_a_limit_any_test_may_be_slow(pytester: pytest.Pytester) -> None:
    assert run(pytester, SLEEP.format(mark=""))[0] == 1


def test_modules_stay_together() -> None:
    scheduler = object.__new__(ByModule)
    names = ("tests/a/test_b.py::test_c[d::e]", "tests/a/test_b.py::test_f", "tests/slurm/test_g.py::test_h",
             "tests/slurm/test_i.py::test_j")  # fmt: skip
    assert [scheduler._split_scope(name) for name in names] == ["tests/a/test_b.py"] * 2 + ["tests/slurm"] * 2


def work_and_sleep(seconds: float, file: str) -> None:
    """Use a processor for so long, say so in a file, and then do nothing."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    Path(file).write_text(str(os.getpid()))
    time.sleep(3600)


@pytest.mark.distributed
def test_patience_lasts_as_long_as_the_work(tmp_path: Path) -> None:
    idle = tmp_path / "idle"
    process = start("tests.test_suite:work_and_sleep", [3, str(idle)], tmp_path / "log")
    assert process.pid is not None
    patience = Patience([process.pid], seconds=2)
    while not patience.is_over():
        time.sleep(0.1)
    assert idle.exists() and process.is_alive()
    process.kill()
    assert wait([process]) == [-signal.SIGKILL]


STARTER = """
import sys, time
from pathlib import Path
from tests.processes import start

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    start("tests.test_suite:work_and_sleep", [0, str(folder / "pid")], folder / "log")
    time.sleep(3600)
"""


@pytest.mark.e2e
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "starter.py").write_text(STARTER)
    command = [sys.executable, str(tmp_path / "starter.py"), str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as starter:
        patience = Patience([starter.pid])
        while not (tmp_path / "pid").exists():
            assert not patience.is_over() and starter.poll() is None
            time.sleep(0.05)
        started = psutil.Process(int((tmp_path / "pid").read_text()))
        starter.kill()
    started.wait(60)
