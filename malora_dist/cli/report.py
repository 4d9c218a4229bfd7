"""`malora report`: the report of a run, written again."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.config.evaluation_target import check_run_folder


def report(run_dir: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write the report of a run: one HTML file with tables and charts."""
    check_run_folder(run_dir)
    written = import_module("malora_dist.report").write_report(run_dir)
    Console().print(Text(f"wrote {written}"), soft_wrap=True)
