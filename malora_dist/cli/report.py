"""`malora report`: the report of a run, written again."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.errors import ConfigError


def report(run_dir: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write the report of a run: one HTML file with tables and charts."""
    if not run_dir.is_dir():
        raise ConfigError(f"RUN_DIR={run_dir} is not a folder")
    written = import_module("malora_dist.report").write_report(run_dir)
    Console().print(Text(f"wrote {written}"), soft_wrap=True)
