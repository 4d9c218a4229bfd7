"""`malora inspect`: what a folder is, as text or JSON."""

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, checkpoint, adapter (also PEFT's), model or DeepSpeed folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of text.")] = False,
) -> None:
    """Describe a folder: method, numbers, counts, norms of experts, and damage. Exit code 1 if there is damage."""
    facts = import_module("malora_dist.cli.inspect.detect").inspect(path)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        for line in import_module("malora_dist.cli.inspect.lines").lines(facts):
            Console().print(Text(line), soft_wrap=True)
    raise typer.Exit(1 if facts["damaged"] else 0)
