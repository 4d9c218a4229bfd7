"""`malora train`: a run, on one process or several."""

from importlib import import_module
from typing import Annotated

import typer

from malora_dist.cli.options import MasterPort, NumGpus, Recipe, recipe_first
from malora_dist.cli.start import start
from malora_dist.config import NEW_RUN, load_config


def train(
    context: typer.Context,
    recipe: Recipe,
    num_gpus: NumGpus = None,
    master_port: MasterPort = None,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Start a new run next to the one in output_dir instead of resuming that.")
    ] = False,
) -> None:
    """Train, or resume the unfinished run in output_dir.

    Outside a launcher, several GPUs are used through `deepspeed`; --num_gpus 1 trains in this process.
    """
    path, overrides = recipe_first(recipe, context.args)
    overrides += [NEW_RUN] if new_run else []
    config = load_config(path, overrides)
    arguments = [path, *overrides]
    start(
        lambda: import_module("malora_dist.train").main(arguments),
        "malora_dist.train",
        arguments,
        num_gpus,
        config,
        master_port,
    )
