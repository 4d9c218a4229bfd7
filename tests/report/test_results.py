import math

import pytest

from malora_dist.report.results import Results, Score, TaskResult, headline, improvements, percent, read_results


def score(accuracy: float, n: int = 400, majority: float | None = 0.25) -> Score:
    return Score(n=n, accuracy=accuracy, stderr=math.sqrt(accuracy * (1 - accuracy) / n), majority=majority)


@pytest.mark.parametrize(
    ("before", "after", "majority", "verdict"),
    [
        pytest.param(0.30, 0.60, 0.30, "improved, beats majority", id="clear"),
        pytest.param(0.30, 0.40, 0.40, "improved, not above majority", id="only as good as guessing"),
        pytest.param(0.30, 0.40, None, "improved, not above majority", id="majority unknown"),
        pytest.param(0.30, 0.36, 0.30, "no clear change", id="1.8 errors up"),
        pytest.param(0.36, 0.30, 0.30, "no clear change", id="1.8 errors down"),
        pytest.param(0.40, 0.30, 0.30, "worse", id="3 errors down"),
    ],
)
def test_verdicts(before: float, after: float, majority: float | None, verdict: str) -> None:
    assert TaskResult("t", score(before), score(after, majority=majority)).verdict == verdict


def test_the_error_of_a_difference_joins_both_errors() -> None:
    result = TaskResult("t", Score(n=9, accuracy=0.2, stderr=0.03), Score(n=9, accuracy=0.5, stderr=0.04))
    assert result.difference == pytest.approx(0.3) and result.difference_stderr == pytest.approx(0.05)


def test_verdicts_without_accuracy() -> None:
    assert TaskResult("t", Score(n=5, loss=2.0), Score(n=5, loss=1.0)).verdict == "lower loss"
    assert TaskResult("t", Score(n=5, loss=1.0), Score(n=5, loss=1.0)).verdict == "loss not lower"
    assert TaskResult("t", None, score(0.5)).verdict == "zero-shot not measured"
    assert TaskResult("t", score(0.5), None).verdict == "tuned not measured"


def test_the_average_is_over_tasks_measured_on_both_sides() -> None:
    tasks = [
        TaskResult("a", score(0.2), score(0.4)),
        TaskResult("b", score(0.4), score(0.8)),
        TaskResult("only before", score(0.9), None),
        TaskResult("completion", Score(n=5, loss=2.0), Score(n=5, loss=1.0)),
    ]
    average = Results(tasks).average
    assert average is not None and average.difference == pytest.approx(0.3) and average.n == 800
    errors = [task.base.stderr for task in tasks[:2] if task.base is not None]
    assert average.base is not None and average.base.stderr == pytest.approx(math.hypot(*errors) / 2)
    assert headline(Results(tasks)) == "Average accuracy 30.0 % → 60.0 % over 2 tasks"
    assert Results(tasks[2:]).average is None and headline(Results(tasks[2:])) == ""


def test_improvements_in_words() -> None:
    tasks = [
        TaskResult("up", score(0.2), score(0.6)),
        TaskResult("same", score(0.3), score(0.3)),
        TaskResult("down", score(0.6), score(0.3)),
    ]
    assert improvements(Results(tasks)) == (
        "1 of 3 tasks improved by more than 2 standard errors: up. No clear change: same. Worse: down."
    )
    assert improvements(Results(tasks[:1])).endswith("None is worse.") and improvements(Results([])) == ""


def test_read_results_in_the_given_order_and_ignores_unknown_numbers() -> None:
    row = {"n": 3, "accuracy": 0.5, "stderr": 0.1, "f1": 0.3}
    results = read_results({"base": {"tasks": {"b": row, "a": row}}, "tuned": {"tasks": {"c": row}}}, ["a", "c"])
    assert [result.task for result in results.tasks] == ["a", "c", "b"]
    assert results.tasks[1].base is None and results.tasks[1].tuned == Score(n=3, accuracy=0.5, stderr=0.1)
    assert read_results({}).tasks == []


def test_percent() -> None:
    assert [percent(0.4125), percent(-0.02, sign=True), percent(0.2, sign=True), percent(None)] == [
        "41.2", "−2.0", "+20.0", "–",
    ]  # fmt: skip
