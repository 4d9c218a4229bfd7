"""`malora bench ...`: measurements. Nothing here needs torch before a command runs."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from malora_dist.bench.ep_options import EpOptions
from malora_dist.bench.local.options import DTYPES
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import CONTESTANTS
from malora_dist.bench.variants import TOPICS, recipe_variant
from malora_dist.cli.options import OVERRIDES, MasterPort, NumGpus, Recipe, recipe_first
from malora_dist.cli.start import start
from malora_dist.config import load_config

bench = typer.Typer(help="Measure variants of a recipe, layers and steps side by side.", no_args_is_help=True)

Only = Annotated[str | None, typer.Option(help=f"Who takes part, of {','.join(CONTESTANTS)}.")]
Against = Annotated[str | None, typer.Option(help="Whom ratios are to; takes part. Default: peft_lora, or the first.")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}, or short: of the base and of products.")]
BaseKind = Annotated[str, typer.Option("--base", help="full or nf4.")]
Dropout = Annotated[float, typer.Option(min=0, max=0.99, help="On the adapters' input.")]
Model = Annotated[str, typer.Option(help="smollm2 (the demo's), random-1b (a Llama), a folder, GGUF file or hub id.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a row.")]
Labels = Annotated[str, typer.Option(help="all, or the share of each row's tokens that is learned.")]
Loss = Annotated[str, typer.Option(help="hf: the model's own, on the logits of all tokens. chunked: ours, for all.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds measured.")]
Warmup = Annotated[int, typer.Option(min=0, help="Rounds before them.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as torch finds them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:NUMBER.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every record here.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the tables here.")]


@bench.command()
def layer(
    size: Annotated[
        str, typer.Option(help="Linears as INPUTSxOUTPUTS, or one number for both.")
    ] = "576,2048,4096,4096x11008,11008x4096",
    tokens: Annotated[str, typer.Option(help="Rows of the input; a list is that many cases.")] = "1024",
    dtype: Dtype = "fp32",
    base: BaseKind = "full",
    dropout: Dropout = 0.0,
    only: Only = None,
    against: Against = None,
    repeats: Repeats = 10,
    warmup: Warmup = 2,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Measure forward and backward of one adapted linear, in turns: ours, PEFT's, dispatched mixtures, the base."""
    given = {"size": size, "tokens": tokens, "dtype": dtype, "base": base, "dropout": dropout, "only": only}
    given |= {"against": against, "repeats": repeats, "warmup": warmup, "threads": threads, "device": device}
    _run("layer", "LayerOptions", given, Output(as_json, markdown))


@bench.command()
def step(
    case: Annotated[
        str,
        typer.Option(help="step; experts: 8 and 64 of them; tokens: twice as many; optimizer: its step alone."),
    ] = "step",
    model: Model = "smollm2",
    batch: Batch = 4,
    length: Length = 256,
    dtype: Dtype = "bf16",
    base: BaseKind = "full",
    dropout: Dropout = 0.0,
    labels: Labels = "all",
    loss: Loss = "hf",
    only: Only = None,
    against: Against = None,
    repeats: Repeats = 10,
    warmup: Warmup = 2,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Measure whole training steps of a real model: forward, loss, backward and fused AdamW, in turns on one batch."""
    given = {"case": case, "model": model, "batch": batch, "length": length, "dtype": dtype, "base": base}
    given |= {"dropout": dropout, "labels": labels, "loss": loss, "only": only, "against": against}
    given |= {"repeats": repeats, "warmup": warmup, "threads": threads, "device": device}
    _run("step", "StepOptions", given, Output(as_json, markdown))


@bench.command()
def memory(
    model: Model = "smollm2",
    batch: Batch = 4,
    length: Length = 256,
    dtype: Dtype = "bf16",
    base: Annotated[str, typer.Option("--base", help="full, nf4, or both.")] = "full,nf4",
    checkpointing: Annotated[str, typer.Option(help="off, on, or both: blocks are computed again.")] = "off,on",
    dropout: Dropout = 0.0,
    labels: Labels = "all",
    loss: Loss = "hf",
    only: Only = None,
    repeats: Annotated[int, typer.Option(min=0, help="Rounds of steps on either base; 0 measures no time.")] = 5,
    warmup: Warmup = 1,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Count the most bytes of tensors in a training step exactly; measure what a 4-bit base saves, and its time."""
    given = {"model": model, "batch": batch, "length": length, "dtype": dtype, "base": base, "dropout": dropout}
    given |= {"checkpointing": checkpointing, "labels": labels, "loss": loss, "only": only, "repeats": repeats}
    given |= {"warmup": warmup, "threads": threads, "device": device}
    _run("memory", "MemoryOptions", given, Output(as_json, markdown))


@bench.command()
def launches(
    hidden: Annotated[int, typer.Option(min=16, help="Width of the model, a multiple of 16.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the input.")] = 128,
    dtype: Dtype = "bf16",
    base: BaseKind = "full",
    dropout: Annotated[str, typer.Option(help="On the adapters' input; a list is that many cases.")] = "0,0.05",
    only: Annotated[str | None, typer.Option(help="Who takes part, of those of the table, and the base.")] = None,
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Count, on the CPU, what a GPU would launch and wait for in a linear, in q, k and v, and in a block."""
    given = {"hidden": hidden, "tokens": tokens, "dtype": dtype, "base": base, "dropout": dropout, "only": only}
    _run("launches", "LaunchOptions", given, Output(as_json, markdown))


@bench.command()
def roofline(
    model: Annotated[str | None, typer.Option(help="config.json, folder or GGUF file. Default: LLaMA-2 7B.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 4096,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 1024,
    base: BaseKind = "full",
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="On the input of every adapter.")] = 0.0,
    attention: Annotated[str, typer.Option(help="varlen: each sample alone. sdpa: whole rows, masked.")] = "varlen",
    flops: Annotated[str | None, typer.Option(help="bf16 rate of the device. Default: an H100's 989TFLOP/s.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Rate of its memory. Default: an H100's 3.35TB/s.")] = None,
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Compute the least time of a step, by formula, from FLOPs and bytes of each kernel. Needs no torch and no GPU."""
    from malora_dist.bench.roofline_tables import RooflineOptions, run

    given = {"model": model, "tokens": tokens, "length": length, "base": base, "dropout": dropout}
    given |= {"attention": attention, "flops": flops, "bandwidth": bandwidth}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    run(RooflineOptions(**chosen), Output(as_json, markdown))


@bench.command(context_settings=OVERRIDES)
def ep(
    context: typer.Context,
    recipe: Recipe,
    num_gpus: NumGpus = None,
    master_port: MasterPort = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured of each variant.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 2,
    variants: Annotated[
        str | None, typer.Option(help=f"What to compare, of {','.join(TOPICS)}. Default: all that fits.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write every step of every variant here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
) -> None:
    """Measure step time, bytes and loss: experts spread or not, overlap, 4-bit base, ZeRO stages, in turns."""
    path, overrides = recipe_first(recipe, context.args)
    config = load_config(path, overrides)
    options = EpOptions(
        recipe=path,
        overrides=tuple(overrides),
        topics=tuple(topic for topic in (variants or "").split(",") if topic),
        steps=steps,
        warmup=warmup,
        json=as_json,
        markdown=markdown,
    )
    options.check_files()
    start(
        lambda: import_module("malora_dist.bench.run").measure(options),
        "malora_dist.bench.run",
        options.words(),
        num_gpus,
        recipe_variant(config).of(config),
        master_port,
    )


@bench.command(context_settings=OVERRIDES)
def data(
    context: typer.Context,
    recipe: Recipe,
    repeats: Repeats = 5,
    warmup: Warmup = 2,
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Measure tokens a second of a recipe's data, tokenised, drawn and packed, against its training on one process."""
    path, overrides = recipe_first(recipe, context.args)
    loaded = import_module("malora_dist.bench.local.data_rate")
    options = loaded.DataOptions(recipe=path, overrides=tuple(overrides), repeats=repeats, warmup=warmup)
    raise typer.Exit(loaded.main(options, Output(as_json, markdown)))


@bench.command()
def quality(
    suites: Annotated[list[Path], typer.Argument(metavar="SUITE.yaml...", help="Suites; their runs take turns.")],
    out: Annotated[Path, typer.Option(help="Folder of tasks, runs and results.")] = Path("quality"),
    show: Annotated[bool, typer.Option("--list", help="Print all runs that are known to be needed, and end.")] = False,
    only: Annotated[str, typer.Option(help="Pattern of a shell: the runs to make, by their names.")] = "*",
    table: Annotated[bool, typer.Option("--table", help="Print the tables of all results so far, and end.")] = False,
    final: Annotated[bool, typer.Option("--final", help="Also the final runs, the only ones that read test.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="End after as many runs.")] = None,
    markdown: Markdown = None,
) -> None:
    """Compare how well methods learn tasks together: equal parameters, a rate search for each, paired statistics.

    Runs are trained one after another at the lowest priority. Started again it goes on; OUT/pause lets it stand still.
    """
    loaded = import_module("malora_dist.bench.quality.main")
    options = loaded.QualityOptions(
        suites=tuple(suites), out=out, only=only, final=final, jobs=jobs, limit=limit, markdown=markdown
    )
    loaded.tables(options) if table else loaded.listing(options) if show else loaded.queue(options)


def _run(module: str, options: str, given: dict[str, Any], output: Output) -> None:
    """`run` of a module of `bench.local`, which may import torch, with its options."""
    loaded = import_module(f"malora_dist.bench.local.{module}")
    loaded.run(getattr(loaded, options)(**given), output)
