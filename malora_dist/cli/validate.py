"""`malora validate`: what is wrong with a recipe, and what it comes to."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.cli.local_base import base_notes
from malora_dist.cli.options import Recipe, recipe_first
from malora_dist.config import load_config
from malora_dist.config.compatibility import check_plan, suggest_world_sizes
from malora_dist.config.summary import missing_files, summary_table


def validate(
    context: typer.Context,
    recipe: Recipe,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", "--world_size", min=1, help="Number of processes to check the recipe for."),
    ] = None,
) -> None:
    """Check a recipe: keys, values, batch sizes, whether the plan can run, and the model if it is on this machine.

    No weight is read.
    """
    config = load_config(*recipe_first(recipe, context.args))
    worlds = suggest_world_sizes(config)
    plan = check_plan(config, world_size or (worlds[0] if worlds else 1))
    notes_of_base = base_notes(config)
    console = Console()
    console.print(Text(f"{recipe} is valid", style="green"), soft_wrap=True)
    console.print(summary_table(config, plan, worlds, world_size_given=world_size is not None))
    notes = [*(plan.notes if world_size is not None else ()), *missing_files(config), *notes_of_base]
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
