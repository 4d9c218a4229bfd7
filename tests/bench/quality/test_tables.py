"""The tables, from results whose numbers are known."""

import pytest

from malora_dist.bench.quality.results import Result
from malora_dist.bench.quality.runs import Bench, Run
from malora_dist.bench.quality.schedule import planned
from malora_dist.bench.quality.tables import markdown, sheets
from tests.bench.quality.suites import TINY, results_of, tiny_bench

ACCURACY = {"base": 0.1, "lora": 0.5, "molora": 0.7, "alone": 0.6, "rslora": 0.5}


def accuracy(run: Run) -> float | None:
    """Every method's own, a tenth less at any rate but 0.001; one run fails."""
    if run.method == "lora" and run.rate == 0.002:
        return None
    return ACCURACY[run.method] - (0.1 if run.rate != 0.001 else 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, dict[str, Result]]:
    bench = tiny_bench(tmp_path_factory.mktemp("tables"), TINY | {"pilot": {"keep": 2}})
    results: dict[str, Result] = {}
    for _ in range(4):
        results = results_of(planned(bench, results, final=False), accuracy)
    return bench, results


def table(made: tuple[Bench, dict[str, Result]], title: str) -> dict[str, dict[str, str]]:
    (sheet,) = [sheet for sheet in sheets(*made) if sheet.title.startswith(title)]
    return {row[0]: dict(zip(sheet.headers, row, strict=True)) for row in sheet.rows}


def test_pilot(made: tuple[Bench, dict[str, Result]]) -> None:
    rows = table(made, "Pilot of tiny")
    assert rows["colour"]["zero-shot"] == "10.0" and rows["colour"]["alone"] == "60.0"
    assert rows["colour"]["gain"] == "+50.0" and rows["animal"][""] == "kept"


def test_learning_rates(made: tuple[Bench, dict[str, Result]]) -> None:
    rows = table(made, "Learning rates of tiny")
    assert (
        rows["lora"]["0.001"] == "**50.0**" and rows["lora"]["0.002"] == "failed" and rows["lora"]["0.0005"] == "40.0"
    )


def test_methods_and_what_they_lead_by(made: tuple[Bench, dict[str, Result]]) -> None:
    rows = table(made, "Methods of tiny, validation")
    assert rows["molora"]["mean"] == "70.0" and rows["molora"]["seeds"] == "2" and rows["molora"]["rate"] == "0.001"
    assert rows["molora"]["minus lora"] == "+20.0" and rows["molora"]["95 %"].startswith("+")
    assert rows["rslora"]["minus lora"] == "+0.0" and rows["rslora"]["95 %"] == "+0.0 to +0.0"
    assert rows["lora"]["minus lora"] == "" and rows["lora"]["parameters"] == f"{made[0].parameters['lora']:,}"


def test_seesaw(made: tuple[Bench, dict[str, Result]]) -> None:
    rows = table(made, "Seesaw of tiny")
    assert (rows["lora"]["colour"], rows["lora"]["lose"]) == ("-10.0", "2 of 2")
    assert (rows["molora"]["animal"], rows["molora"]["lose"]) == ("+10.0", "0 of 2")
    assert "alone" not in rows


def test_failures_are_listed(made: tuple[Bench, dict[str, Result]]) -> None:
    (row,) = table(made, "Runs of tiny that failed").values()
    assert row["run"].startswith("tiny_lora_lr0.002_s1_") and row["error"] == "exit code 1"


def test_before_the_pilot_is_done_there_is_its_table_alone(made: tuple[Bench, dict[str, Result]]) -> None:
    bench, results = made
    some = {key: found for key, found in results.items() if found.record["method"] == "base" or "colour" in key}
    assert [sheet.title[:13] for sheet in sheets(bench, some)] == ["Pilot of tiny"]
    assert not list(sheets(bench, {}))
    assert markdown([bench], {}).startswith("## tiny")
