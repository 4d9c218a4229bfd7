"""`malora prepare`: what a run would otherwise fetch and compute at its start."""

from importlib import import_module

import typer

from malora_dist.cli.options import Recipe, recipe_first


def prepare(context: typer.Context, recipe: Recipe) -> None:
    """Download the model, tokenise the tasks and quantise the base, once and without a GPU; runs use the result."""
    path, overrides = recipe_first(recipe, context.args)
    raise typer.Exit(import_module("malora_dist.prepare").main([path, *overrides]))
