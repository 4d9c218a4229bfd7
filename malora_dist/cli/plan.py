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
    model: Annotated[
        str | None, typer.Option(help="config.json or folder of the base model, if it is not on this machine.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs per node. Default: the largest number up to 8 that divides the batch."),
    ] = None,
    hbm: Annotated[str, typer.Option(help="GPU memory.")] = "80GiB",
    intra: Annotated[str, typer.Option(help="Bandwidth per GPU within a node.")] = "450GB/s",
    inter: Annotated[str, typer.Option(help="Bandwidth per GPU between nodes.")] = "50GB/s",
    flops: Annotated[str, typer.Option(help="Achieved rate of a GPU in model.dtype.")] = "400TFLOP/s",
    tokens_per_sample: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens per sample. Default: data.max_seq_length.")
    ] = None,
    targets_per_sample: Annotated[
        int | None,
        typer.Option(min=1, help="Mean tokens per sample that have a label, whose logits are computed. Default: all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
) -> None:
    """Estimate memory, communication and step time of a run, and find the fastest plan that fits. Needs no GPU.

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
