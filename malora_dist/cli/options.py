"""Arguments and options that several commands have."""

from collections.abc import Sequence
from typing import Annotated

import typer

from malora_dist.errors import ConfigError

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
OVERRIDES_HELP = "The recipe. Settings may follow it: --adapter.r 16 --train.learning_rate=5e-4"

Recipe = Annotated[str, typer.Argument(metavar="RECIPE.yaml", show_default=False, help=OVERRIDES_HELP)]
NumGpus = Annotated[
    int | None,
    typer.Option(
        "--num_gpus", "--num-gpus", min=1, help="Number of processes, one per GPU. Default: all visible GPUs."
    ),
]
MasterPort = Annotated[
    int | None,
    typer.Option(
        "--master_port",
        "--master-port",
        min=1,
        max=65535,
        help="Port of the rendezvous (MASTER_PORT). Default: a free port.",
    ),
]


def recipe_first(recipe: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe and its overrides. Raises ConfigError if an option stands where the recipe belongs."""
    if recipe.startswith("-"):
        raise ConfigError(f"the recipe must come before its settings: RECIPE.yaml {recipe} ...")
    return recipe, list(overrides)
