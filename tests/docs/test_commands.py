"""Every command of README and docs parses; blocks of commands are run, or say why they are not."""

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import malora
from tests.docs.command_line import check_mention, malora_commands, parse
from tests.docs.pages import ALL_BLOCKS, PAGES, Block, inline_code
from tests.multiprocess import ROOT

SHELL = [block for block in ALL_BLOCKS if block.language in ("bash", "console")]
RUN = [block for block in SHELL if block.mark == "run"]
# Their examples are compared with what the command prints by a test of their own.
COMPARED_ELSEWHERE = {ROOT / "docs" / "plan.md": "tests/test_printed_plans.py"}
TARGET = re.compile(r"\bmake ([a-z][a-z-]*)")


def test_every_block_has_a_language_and_commands_have_a_mark() -> None:
    assert not [str(block) for block in ALL_BLOCKS if not block.language]
    assert not [str(block) for block in SHELL if block.mark is None and block.page not in COMPARED_ELSEWHERE]
    assert all((ROOT / test).is_file() for test in COMPARED_ELSEWHERE.values())


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_parse(block: Block) -> None:
    for line in block.commands:
        for arguments in malora_commands(line):
            parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for code in inline_code(page):
        if code.startswith("malora "):
            check_mention(code)
        if code.startswith("make "):
            assert set(TARGET.findall(code)) <= targets, code


@pytest.mark.parametrize("block", RUN, ids=str)
def test_marked_commands_print_what_the_page_shows(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    for command, printed in zip(shown[1::2], shown[2::2], strict=True):
        program, *arguments = shlex.split(command, comments=True)
        assert program == "malora", command
        assert malora(*arguments) == 0, command
        pattern = re.escape(printed.strip()).replace(r"\.\.\.", ".*")
        found = re.sub(r" +$", "", capsys.readouterr().out.strip(), flags=re.MULTILINE)
        assert re.fullmatch(pattern, found, re.DOTALL), command
