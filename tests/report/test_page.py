import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from malora_dist.errors import MaloraError
from malora_dist.report import write_report
from tests.report.run_folder import EXPERTS, TASKS, write_run

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Text of the page, its ids, and a failure where a tag is not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f" {data.strip()}"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo")
    assert write_report(folder) == folder / "report" / "index.html"
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return (run_dir / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_for_nothing(page: str) -> None:
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids)) > 100
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', page)) <= set(outline.ids)
    assert not re.search(r"https?:|src=|<link|<script|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) - {"c"} <= set(re.findall(r"--([a-z0-9-]+):", page))


def test_it_tells_the_result_first(page: str, run_dir: Path) -> None:
    values = json.loads((run_dir / "eval.json").read_text())
    before, after = (f"{100 * values[side]['average']:.1f} %" for side in ("base", "tuned"))
    assert f"<h1>Average accuracy {before} → {after} over 5 tasks</h1>" in page
    assert "4 of 5 tasks improved by more than 2 standard errors: alpha, beta, gamma, delta." in page


def test_each_task_has_its_numbers_verdict_and_pictures(page: str, run_dir: Path) -> None:
    values = json.loads((run_dir / "eval.json").read_text())
    for task in TASKS:
        base, tuned = (values[side]["tasks"][task] for side in ("base", "tuned"))
        (row,) = re.findall(rf'<tr><th><span [^>]*>{task}</span><span class="verdict.*?</tr>', page)
        cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row)]
        shown = [f"{100 * side['accuracy']:.1f}± {100 * side['stderr']:.1f}" for side in (base, tuned)]
        assert cells[:4] == ["300", f"{100 * base['majority']:.1f}", *shown]
        assert cells[4].startswith(f"{100 * (tuned['accuracy'] - base['accuracy']):+.1f}±")
        assert f'aria-label="Training loss of {task}' in page
    charts = re.findall(r'aria-label="([^"]*)"', page)
    assert len(charts) == 1 + 6 + len(TASKS) + 3 + 6, charts
    assert page.count("opacity: ") >= len(TASKS) * EXPERTS


def test_what_is_missing_is_left_out_and_said(tmp_path: Path) -> None:
    text = Outline(write_report(tmp_path).read_text()).text
    for sentence in (
        "There is no eval.json",
        "There are no training records in metrics.jsonl",
        "There is no routing to show: metrics.jsonl holds no routing record",
        "There is no data.json",
        "Not in the run folder: config.yaml, metrics.jsonl, eval.json, data.json, adapter/adapter_config.json",
    ):
        assert sentence in text
    assert "<svg" not in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "eval.json", "data.json", "adapter/adapter_config.json"]
)
def test_every_file_may_be_missing_alone(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "demo", tasks=["a", "b"], steps=20, layers=1)
    (folder / name).unlink()
    assert f"Not in the run folder: {name}." in Outline(write_report(folder).read_text()).text


def test_a_side_that_was_not_measured(run_dir: Path, tmp_path: Path) -> None:
    tuned = json.loads((run_dir / "eval.json").read_text())["tuned"]
    (tmp_path / "eval.json").write_text(json.dumps({"tuned": tuned}))
    text = Outline(write_report(tmp_path).read_text()).text
    assert "eval.json does not hold the untouched base" in text and "zero-shot not measured" in text
    assert "Training run" in text and "Average accuracy" not in text


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    names = ["<b>&'", "$x^2$", "a name far longer than any chart has room for"]
    folder = write_run(tmp_path / "demo", tasks=names, steps=20, layers=1)
    page = write_report(folder).read_text()
    text = Outline(page).text
    assert "<b>" not in page and all(name in text for name in names)


def test_completion_alone_shows_losses(tmp_path: Path) -> None:
    sides = {
        side: {"tasks": {"t": {"n": 7, "loss": loss}}, "average": None}
        for side, loss in (("base", 2.0), ("tuned", 1.5))
    }
    (tmp_path / "eval.json").write_text(json.dumps(sides))
    text = Outline(write_report(tmp_path).read_text()).text
    assert "2.000" in text and "1.500" in text


def test_a_report_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "report").touch()
    with pytest.raises(MaloraError, match="index.html cannot be written: File exists"):
        write_report(tmp_path)


def test_lora_has_no_routing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("adapter: {method: lora, r: 64}")
    assert "There is no routing to show: lora has one expert." in Outline(write_report(tmp_path).read_text()).text


def test_without_matplotlib_the_page_has_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_report(write_run(tmp_path / "demo")).read_text(encoding="utf-8")
    assert "<svg" not in text and "Accuracy in %" in text
    assert text.count("matplotlib is not installed") == 2
    Outline(text)
