"""`malora evaluate`: accuracies of a run or an adapter, on one process or several."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from malora_dist.cli.options import MasterPort, NumGpus
from malora_dist.cli.start import MALORA, start
from malora_dist.config.evaluation_target import evaluation_target


def evaluate(
    context: typer.Context,
    run_dir: Annotated[str | None, typer.Argument(metavar="RUN_DIR", help="Run folder.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="Adapter folder, instead of a run folder.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Recipe with the adapter's base model and tasks.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New JSON file for the result, instead of one in the folder.")
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Print the result and write no file.")] = False,
    num_gpus: NumGpus = None,
    master_port: MasterPort = None,
) -> None:
    """Measure the accuracy of a run, or of an adapter with a recipe, on each task."""
    overrides = list(context.args)
    if run_dir is not None and run_dir.startswith("--"):
        overrides, run_dir = [run_dir, *overrides], None
    target = evaluation_target(run_dir, adapter, recipe, overrides, output=output, save=not no_save)
    start(
        lambda: import_module("malora_dist.training.evaluation_run").evaluate(target),
        MALORA,
        ["evaluate", *target.words()],
        num_gpus,
        None,
        master_port,
    )
