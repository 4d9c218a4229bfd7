import io
import random

from rich.console import Console

from malora_dist.report.terminal import print_results
from tests.report.run_folder import TASKS, evaluations


def printed(values: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(print_results(values))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_for_each_task_with_counts_and_errors() -> None:
    values = evaluations(TASKS, random.Random(0))
    lines = printed(values).splitlines()
    for task in TASKS:
        (line,) = (line for line in lines if line.split()[:1] == [task])
        base, tuned = (values[side]["tasks"][task] for side in ("base", "tuned"))
        numbers = [f"{100 * row['accuracy']:.1f} ±  {100 * row['stderr']:.1f}" for row in (base, tuned)]
        assert line.split()[1] == "300" and f"{100 * base['majority']:.1f}" in line
        assert numbers[0] in line and numbers[1] in line.replace(numbers[0], "", 1)
    text = " ".join(" ".join(lines).split())
    averages = [f"{100 * values[side]['average']:.1f}" for side in ("base", "tuned")]
    assert f"Average accuracy {averages[0]} % → {averages[1]} % over 5 tasks." in text


def test_completion_tasks_show_their_loss() -> None:
    text = printed({"base": {"tasks": {"t": {"n": 7, "loss": 2.0}}}, "tuned": {"tasks": {"t": {"n": 7, "loss": 1.5}}}})
    assert "loss 2.000" in text and "loss 1.500" in text and "−0.500" in text and "lower loss" in text
    assert "average" not in text.lower()


def test_names_are_not_taken_for_markup() -> None:
    assert "[red]x" in printed({"tuned": {"tasks": {"[red]x": {"n": 7, "accuracy": 0.5}}}})
