"""What eval.json says: each task before and after, with the errors of both and a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEYOND = 2.0  # standard errors a difference must exceed to be called one


@dataclass(frozen=True)
class Score:
    """One measurement of one task. Accuracies are from 0 to 1, and None for a task without choices."""

    n: int
    loss: float | None = None
    accuracy: float | None = None
    stderr: float = 0.0
    accuracy_norm: float | None = None
    majority: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """A task before (`base`) and after (`tuned`); a side that was not measured is None."""

    task: str
    base: Score | None
    tuned: Score | None

    @property
    def n(self) -> int:
        return max(side.n for side in (self.base, self.tuned) if side is not None)

    @property
    def majority(self) -> float | None:
        return next((side.majority for side in (self.tuned, self.base) if side is not None), None)

    @property
    def difference(self) -> float | None:
        """Accuracy after minus before."""
        if self.base is None or self.tuned is None or self.base.accuracy is None or self.tuned.accuracy is None:
            return None
        return self.tuned.accuracy - self.base.accuracy

    @property
    def difference_stderr(self) -> float:
        """Standard error of the difference, as of two independent measurements.

        Both sides answer the same questions, so their errors mostly go together and the true error is mostly smaller.
        """
        sides = (self.base, self.tuned)
        return math.hypot(*(side.stderr for side in sides if side is not None))

    @property
    def improved(self) -> bool:
        return self.difference is not None and self.difference > BEYOND * self.difference_stderr

    @property
    def worse(self) -> bool:
        return self.difference is not None and self.difference < -BEYOND * self.difference_stderr

    @property
    def beats_majority(self) -> bool:
        tuned = self.tuned
        if tuned is None or tuned.accuracy is None or tuned.majority is None:
            return False
        return tuned.accuracy - tuned.majority > BEYOND * tuned.stderr

    @property
    def verdict(self) -> str:
        """In words; `improved` and `worse` mean by more than 2 standard errors."""
        if self.difference is None:
            return self._verdict_without_accuracy()
        if self.improved:
            return "improved, beats majority" if self.beats_majority else "improved, not above majority"
        return "worse" if self.worse else "no clear change"

    def _verdict_without_accuracy(self) -> str:
        if self.base is None:
            return "zero-shot not measured"
        if self.tuned is None:
            return "tuned not measured"
        if self.base.loss is None or self.tuned.loss is None:
            return "not comparable"
        return "lower loss" if self.tuned.loss < self.base.loss else "loss not lower"


@dataclass(frozen=True)
class Results:
    """All tasks, and the means over those whose accuracy was measured on both sides."""

    tasks: Sequence[TaskResult]

    @property
    def compared(self) -> list[TaskResult]:
        return [result for result in self.tasks if result.difference is not None]

    @property
    def average(self) -> TaskResult | None:
        """The mean over `compared` as if it were a task; None if there is none."""
        pairs = [(result.base, result.tuned) for result in self.compared]
        if not pairs:
            return None
        base, tuned = zip(*pairs, strict=True)
        return TaskResult("average", _mean(base), _mean(tuned))


def read_results(evaluations: Mapping[str, Any], order: Sequence[str] = ()) -> Results:
    """Return the results in eval.json's content, `{"base": ..., "tuned": ...}`; tasks in `order` come first."""
    sides = {side: evaluations.get(side, {}).get("tasks", {}) for side in ("base", "tuned")}
    measured = dict.fromkeys([*sides["base"], *sides["tuned"]])
    names = [*(name for name in order if name in measured), *(name for name in measured if name not in order)]
    return Results(
        [TaskResult(name, _score(sides["base"].get(name)), _score(sides["tuned"].get(name))) for name in names]
    )


def headline(results: Results) -> str:
    """Return the average result in one sentence; empty if no accuracy was measured before and after."""
    average = results.average
    if average is None or average.base is None or average.tuned is None:
        return ""
    before, after = percent(average.base.accuracy), percent(average.tuned.accuracy)
    tasks = "1 task" if len(results.compared) == 1 else f"{len(results.compared)} tasks"
    return f"Average accuracy {before} % → {after} % over {tasks}"


def improvements(results: Results) -> str:
    """Return sentences on which tasks moved beyond 2 standard errors; empty if nothing was compared."""
    compared = results.compared
    if not compared:
        return ""
    improved = [result.task for result in compared if result.improved]
    unclear = [result.task for result in compared if not result.improved and not result.worse]
    worse = [result.task for result in compared if result.worse]
    names = f": {', '.join(improved)}" if improved else ""
    sentences = [f"{len(improved)} of {len(compared)} tasks improved by more than 2 standard errors{names}."]
    if unclear:
        sentences.append(f"No clear change: {', '.join(unclear)}.")
    sentences.append(f"Worse: {', '.join(worse)}." if worse else "None is worse.")
    return " ".join(sentences)


def percent(value: float | None, *, sign: bool = False) -> str:
    """Format a fraction in per cent: `41.3`, or `+22.8` with a sign; a dash for None."""
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")


def _score(record: Mapping[str, Any] | None) -> Score | None:
    if record is None:
        return None
    known = {name: record[name] for name in Score.__dataclass_fields__ if name in record}
    return Score(**known)


def _mean(scores: Sequence[Score | None]) -> Score:
    """Return the mean accuracy; the tasks' errors are independent of one another."""
    known = [score for score in scores if score is not None]
    count = len(known)
    majorities = [score.majority for score in known if score.majority is not None]
    return Score(
        n=sum(score.n for score in known),
        accuracy=sum(score.accuracy or 0.0 for score in known) / count,
        stderr=math.hypot(*(score.stderr for score in known)) / count,
        majority=sum(majorities) / count if len(majorities) == count else None,
    )
