"""Docstrings of functions begin with a verb, as CONTRIBUTING.md says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiprocess import ROOT

PACKAGE = ROOT / "malora_dist"
# First words with which sentences about a thing begin, not about what a function does.
NO_VERBS = set(
    "a all an and as at between both by each every for from half here how if in into it its like name names no number "
    "numbers of on one only other others per shape shapes size sizes such that the their there these this those total "
    "two under what when where whether which whose with without".split()
)
# Properties are what they return.
PROPERTIES = {"property", "cached_property", "setter"}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            decorators = {getattr(one, "attr", getattr(one, "id", "")) for one in node.decorator_list}
            if not decorators & PROPERTIES:
                yield node


def begins_with_a_verb(docstring: str) -> bool:
    word = docstring.split()[0].strip(".,:;")
    return word[:1].isalpha() and not word.endswith("'s") and word.lower() not in NO_VERBS


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_docstrings_begin_with_a_verb(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {docstring.splitlines()[0]}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for function in functions(path)
        if (docstring := ast.get_docstring(function)) and not begins_with_a_verb(docstring)
    ]
    assert wrong == [], "\n".join(wrong)
