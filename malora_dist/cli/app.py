"""The command `malora`: one file for each of its commands. Only those that load a model import torch."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist import __version__
from malora_dist.cli.bench import bench
from malora_dist.cli.cluster.app import launch
from malora_dist.cli.convert import EPILOG, convert
from malora_dist.cli.evaluate import evaluate
from malora_dist.cli.init import init
from malora_dist.cli.inspect.inspect_command import inspect
from malora_dist.cli.options import OVERRIDES
from malora_dist.cli.plan import plan
from malora_dist.cli.prepare import prepare
from malora_dist.cli.report import report
from malora_dist.cli.train import train
from malora_dist.cli.validate import validate
from malora_dist.console.terminal import forgive_output
from malora_dist.errors import MaloraError

app = typer.Typer(
    name="malora",
    help="Fine-tune a language model on many tasks with MALoRA, on one machine or a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(init)
for command in (validate, prepare, plan, train, evaluate):
    app.command(context_settings=OVERRIDES)(command)
app.command()(report)
app.command(epilog=EPILOG)(convert)
app.command()(inspect)
app.add_typer(bench, name="bench")
app.add_typer(launch, name="launch")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A MaloraError is one red message and exit code 2; --traceback anywhere shows where."""
    forgive_output()
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    # The deepspeed launcher adds --local_rank.
    words = [word for word in given if word != "--traceback" and not word.startswith("--local_rank=")]
    try:
        app(words)
    except MaloraError as error:
        if show_traceback:
            raise
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"malora_dist {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a language model on many tasks with MALoRA, on one machine or a cluster."""
