"""Commands of the documentation, given to the parser of the command line without being run."""

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import dropwhile, groupby
from typing import Any

import typer

from malora_dist.cli.app import app
from malora_dist.config.overrides import apply_overrides, parse_overrides

ROOT_COMMAND = typer.main.get_command(app)
OPTIONAL = re.compile(r"\[(--?[a-z][^\]]*)\]")
SETTINGS = re.compile(r"\[?--section\.key (value|VALUE)( \.\.\.)?\]?")
ALTERNATIVES = re.compile(r"(\S+?)\|\S+")
# Words of a synopsis that stand for numbers.
PLACEHOLDERS = {"N": "1", "R": "1", "P": "0.1"}
SETS_VARIABLE = re.compile(r"[A-Z_]+=")
TASKS = {"data": {"tasks": [{"name": "boolq"}]}}


def malora_commands(line: str) -> Iterator[list[str]]:
    """Return the arguments of each call of `malora` in a line of a shell, a synopsis with all of its options."""
    line = ALTERNATIVES.sub(r"\1", OPTIONAL.sub(r"\1", SETTINGS.sub("", line)))
    words: Any = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    for is_end, call in groupby(words, key=lambda word: set(word) <= set(";&|")):
        arguments = list(dropwhile(lambda word: SETS_VARIABLE.match(word) is not None, call))
        if not is_end and arguments[:1] == ["malora"]:
            yield [PLACEHOLDERS.get(word, word) for word in arguments[1:] if word != "..."]


def parse(arguments: Sequence[str]) -> None:
    """Parse a command line, and look up the recipe's keys in it. Raises typer's errors, or ours."""
    command, rest = resolve(list(arguments))
    if rest != ["--version"]:
        check_settings(command.make_context("malora", rest).args)


def resolve(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the command that arguments name, and those that are left."""
    command: Any = ROOT_COMMAND
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


def check_settings(arguments: Sequence[str]) -> None:
    """Check that settings given behind a recipe are keys of a recipe."""
    _, problems = apply_overrides({**TASKS}, parse_overrides(arguments))
    assert not problems, [str(problem) for problem in problems]


def check_mention(text: str) -> None:
    """Check a command that is named in a sentence: it exists, and has the options that are named with it."""
    (arguments, *_) = malora_commands(text.split(" | ")[0])
    command, rest = resolve(arguments)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = [
        word.partition("=")[0] for word in (rest[: rest.index("--")] if "--" in rest else rest) if word.startswith("--")
    ]
    for option in options:
        if option not in known | {"--traceback", "--help"}:
            assert "." in option, f"{' '.join(arguments)}: no option {option}"
            check_settings([option, "1"])
