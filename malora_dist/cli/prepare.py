"""`malora prepare`: what a run would otherwise fetch and compute at its start."""

from importlib import import_module

import typer

from malora_dist.cli.options import Recipe, recipe_first


def prepare(context: typer.Context, recipe: Recipe) -> None:
    """Fetch the model, tokenise the tasks and quantise the base once, without a GPU; runs then start from that."""
    path, overrides = recipe_first(recipe, context.args)
    raise typer.Exit(import_module("malora_dist.prepare").main([path, *overrides]))
