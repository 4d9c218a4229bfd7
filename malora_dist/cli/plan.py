"""`malora plan`: memory, communication and time of a run before it starts."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.cli.options import Recipe, recipe_first
from malora_dist.config import load_config
from malora_dist.config.summary import adapter_spec


def plan(
    context: typer.Context,
    recipe: Recipe,
    model: Annotated[str | None, typer.Option(help="The base's config.json or folder, if it is not here.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each. Default: the most up to 8 that can share the batch.")
    ] = None,
    hbm: Annotated[str, typer.Option(help="Memory of a GPU.")] = "80GiB",
    intra: Annotated[str, typer.Option(help="What a GPU sends to others of its node.")] = "450GB/s",
    inter: Annotated[str, typer.Option(help="What a GPU sends to other nodes.")] = "50GB/s",
    flops: Annotated[str, typer.Option(help="What a GPU really computes, in model.dtype.")] = "400TFLOP/s",
    tokens_per_sample: Annotated[
        int | None, typer.Option(min=1, help="Mean length of a sample. Default: data.max_seq_length, its bound.")
    ] = None,
    targets_per_sample: Annotated[
        int | None, typer.Option(min=1, help="Learned tokens of a sample, whose logits are computed. Default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Compute memory, traffic and time of a run before it starts, what fits, and what is fastest; needs no GPU.

    It reads no weights. It needs no torch for models laid out as Llama, Mistral and Qwen 2 and 3 are; others are built
    empty by transformers.
    """
    from malora_dist.plan import Lengths, Report, find_shape, hardware_of

    config = load_config(*recipe_first(recipe, context.args))
    hardware = hardware_of(
        config, nodes=nodes, gpus_per_node=gpus_per_node, hbm=hbm, intra=intra, inter=inter, flops=flops
    )
    shape = find_shape(model or config.model.name_or_path, config.model.revision if model is None else None)
    result = Report(config, adapter_spec(config), shape, hardware, Lengths(tokens_per_sample, targets_per_sample))
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    for part in result.tables():
        Console().print(part, soft_wrap=isinstance(part, Text))
