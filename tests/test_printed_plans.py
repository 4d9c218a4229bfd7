"""docs/plan.md prints what the command prints, and docs/parallelism.md sums up docs/plan.md."""

import re
import shlex

import pytest

from tests.commands import malora
from tests.multiprocess import ROOT

EXAMPLE = re.compile(r"^```console\n\$ malora (plan [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
EXAMPLES = EXAMPLE.findall(PAGE)
SUMMARY = re.compile(r"^\| \d+B.*\|$", re.MULTILINE)


def test_every_example_is_found() -> None:
    assert len(EXAMPLES) == PAGE.count("$ malora") > 0


@pytest.mark.parametrize(("command", "printed"), EXAMPLES)
def test_the_worked_examples_are_what_the_command_prints(
    command: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert malora(*shlex.split(command)) == 0
    assert lines(capsys.readouterr().out) == lines(printed)


def test_the_summary_has_the_numbers_of_the_examples() -> None:
    """The summary leaves out the example in which `ep_size` alone differs from another."""
    summed = [printed for command, printed in EXAMPLES if "--parallel.ep_size" not in command]
    rows = SUMMARY.findall((ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8"))
    assert len(rows) == len(summed)
    for row, printed in zip(rows, summed, strict=True):
        _, memory, step, gathers, best, seconds = (cell.strip() for cell in row.strip("|").split("|"))
        zero, gather = best.partition(",")[0].removeprefix("ZeRO-"), rf"frozen base .* {gathers}"
        assert re.search(rf"^ 3 .* {memory}  +{step}  +this recipe", printed, re.MULTILINE)
        assert re.search(rf"^ {zero} .* off .* {seconds}  +fastest that fits", printed, re.MULTILINE)
        assert gathers == "none" or re.search(gather, printed)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
