"""The command: its list of runs, its tables, and what it refuses; the queue itself is tested beside its module."""

from pathlib import Path

import pytest

from malora_dist.bench.quality.schedule import planned
from malora_dist.files.atomic import write_json
from tests.bench.quality.suites import TINY, results_of, tiny_bench, write_suite
from tests.commands import malora


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A suite whose runs all have results."""
    monkeypatch.setenv("COLUMNS", "200")
    bench = tiny_bench(tmp_path)
    (bench.out / "runs").mkdir()
    for run in planned(bench, {}):
        write_json(bench.out / "runs" / f"{run.id}.json", results_of([run], lambda run: 0.5)[run.id].record)
    return str(tmp_path / "suite.yaml")


def test_list_says_what_is_done_and_what_is_left(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert malora("bench", "quality", suite, "--out", str(tmp_path / "out"), "--list", "--only", "*_lora_*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["middle", "grid", "extension"]
    assert lines[0].endswith("done") and lines[2].endswith("left, 8 s") and "lr0.0005" in lines[2]
    assert lines[3].startswith("tiny: 2 runs done, 2 left")


def test_table_prints_and_writes_tables(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    arguments = ["bench", "quality", suite, "--out", str(tmp_path / "out"), "--table", "--markdown", str(page)]
    assert malora(*arguments) == 0
    assert "Learning rates of tiny" in capsys.readouterr().out
    assert "| lora |" in page.read_text()


def test_two_suites_of_one_name_are_refused(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = write_suite(other, TINY)
    assert malora("bench", "quality", suite, str(second), "--out", str(tmp_path / "out"), "--list") == 2
    assert "`name` must be different in each" in capsys.readouterr().err
