"""`malora init`: a recipe to start from."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.cli.local_base import family_targets
from malora_dist.config.template import recipe_text
from malora_dist.launch.files import write_new_files


def init(
    path: Annotated[Path, typer.Argument(help="Path of the recipe to write.")] = Path("recipe.yaml"),
    with_cluster_files: Annotated[
        bool,
        typer.Option("--with-cluster-files", help="Also write ds_configs/, launchers/ and slurm/ next to the recipe."),
    ] = False,
    model: Annotated[str | None, typer.Option(help="Base model: hub id, folder or .gguf file.")] = None,
) -> None:
    """Write a commented recipe to start from. Nothing is ever overwritten."""
    console = Console()
    targets = None if model is None else family_targets(model)
    # Runs of several recipes in one folder stay apart.
    text = recipe_text(model, targets, f"runs/{path.stem}")
    for written in write_new_files(path, text, with_cluster_files=with_cluster_files):
        console.print(Text(f"wrote {written}"), soft_wrap=True)
    if model is not None and targets is None:
        console.print(
            Text(
                f"note: {model} is not on this machine, or torch is not: adapter.target_modules names Llama's linears; "
                "`malora prepare` compares them with the model's"
            ),
            soft_wrap=True,
        )
    console.print(Text(f"next: put your tasks under data:, then  malora validate {path}"), soft_wrap=True)
