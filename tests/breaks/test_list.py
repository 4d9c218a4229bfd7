"""Every break of the list can be made, and what the runner takes for caught."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.breaks.run import ROOT, Break, Outcome, _outcome, read_breaks


def test_every_break_can_be_made() -> None:
    breaks = read_breaks()
    assert [problem for each in breaks for problem in each.problems(ROOT)] == []
    assert len({each.name for each in breaks}) == len(breaks) >= 40
    assert all(each.old != each.new and each.wrong and each.tests for each in breaks)


def test_a_break_that_fits_no_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "test_a.py").touch()
    fits = Break(name="n", file="a.py", old="x = 1", new="x = 2", wrong="w", tests=("test_a.py",))
    for change, message in (
        ({"old": "= 1"}, "n: a.py must hold its `old` once, and holds it 2 times"),
        ({"old": "z"}, "holds it 0 times"),
        ({"file": "b.py"}, "b.py must hold its `old` once, and holds it 0 times"),
        ({"tests": ("test_b.py",)}, "n: there is no test_b.py"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(fits, **change).apply(tmp_path)  # type: ignore[arg-type]
    fits.apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 2\ny = 1\n"


def test_caught_is_a_test_that_fails() -> None:
    said = (
        "..F\nERROR tests/test_a.py::test_b[x -> y] - OSError\nFAILED tests/test_a.py::test_b[x -> y] - assert 1 == 2\n"
    )
    assert _outcome(1, said, 2.0) == Outcome(True, "tests/test_a.py::test_b[x -> y]", 2.0, "assert 1 == 2")
    fixture = "ERROR tests/test_a.py::test_b - OSError\n"
    assert _outcome(1, fixture, 2.0) == Outcome(True, "tests/test_a.py::test_b", 2.0, "OSError")
    nothing = "ERROR tests/test_a.py - ImportError: no\n"
    for code, output in ((0, "3 passed"), (2, nothing), (None, said), (5, "no tests ran")):
        found = _outcome(code, output, 2.0)
        assert not found.caught and found.first_failing_test is None
