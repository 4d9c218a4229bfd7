"""`malora convert`: an adapter or checkpoint in another form. torch is imported once a kind runs."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist.convert.kinds import KINDS, ConvertOptions, check_options, find_kind
from malora_dist.errors import ConfigError

EPILOG = "\n\n".join(f"--to {name}: {kind.help}." for name, kind in KINDS.items())


def convert(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="SRC DST", help="Source (run, checkpoint or adapter) and a new folder to write."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="KIND", help=f"One of {', '.join(KINDS)}; see below.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Run source and result on real text and compare them.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Text file for --verify. Default: rows of the tasks.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe with the tasks and the base model. Default: that of SRC.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base model. Default: that of the recipe.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device that the base model runs on, if it has to run. Default: cpu.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="checkpoint: number of files for each kind of tensor.")
    ] = None,
    gate: Annotated[str | None, typer.Option(help="peft-experts: one or mean.")] = None,
    fit: Annotated[str | None, typer.Option(help="peft-tasks: lstsq (default) or mean.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="peft-tasks: rank of the LoRAs, at most the exact one.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help="malora, molora: rank of each expert.")] = None,
    shared_r: Annotated[
        int | None, typer.Option("--shared-r", "--shared_r", min=1, help="malora: rank of S_A.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="malora: scale of S_A, as adapter.beta.")] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha", "--lora_alpha", help="from-deepspeed: lora_alpha, which DeepSpeed's files do not hold."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "--top_k", min=1, help="malora, molora: number of experts selected for each token."),
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Samples per task on which gates are measured.")
    ] = None,
    eval_samples: Annotated[
        int | None,
        typer.Option("--eval-samples", min=0, help="peft-tasks: rows per task on which accuracy is measured."),
    ] = None,
) -> None:
    """Convert an adapter or checkpoint: for PEFT, vLLM, or to another number of files. Needs no GPU."""
    find_kind(to)
    options = ConvertOptions(
        shards=shards,
        gate=gate,
        fit=fit,
        rank=rank,
        r=r,
        shared_r=shared_r,
        beta=beta,
        top_k=top_k,
        lora_alpha=lora_alpha,
        calibration=calibration,
        eval_samples=eval_samples,
        recipe=recipe,
        base=base,
        device=device,
        text=text,
        verify=verify,
    )
    check_options(to, options)
    if len(paths) < 2:
        raise ConfigError("malora convert SRC DST --to KIND: DST, a folder to write, is missing")

    def log(line: str) -> None:
        Console().print(Text(line), soft_wrap=True)

    import_module("malora_dist.convert.job").convert(to, tuple(paths[:-1]), paths[-1], options, log)
