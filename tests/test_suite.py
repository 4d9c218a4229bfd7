"""The rules of this suite: a unit test starts no process, a slow test says why, a module stays on one worker."""

import pytest

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
