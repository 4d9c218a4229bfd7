"""`malora bench ...`: measurements. Nothing here needs torch before a command runs."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from malora_dist.bench.ep_options import EpOptions
from malora_dist.bench.local.options import DTYPES
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.variants import TOPICS, recipe_variant
from malora_dist.cli.options import OVERRIDES, MasterPort, NumGpus, Recipe, recipe_first
from malora_dist.cli.start import MALORA, start
from malora_dist.config import load_config

bench = typer.Typer(help="Measure variants of a recipe, layers and steps side by side.", no_args_is_help=True)

Only = Annotated[str | None, typer.Option(help=f"Baselines to measure, from {','.join(BASELINES)}.")]
Against = Annotated[str | None, typer.Option(help="Baseline of the ratios. Default: peft_lora, or the first.")]
Dtype = Annotated[
    str, typer.Option(help=f"{', '.join(DTYPES)}, or an abbreviation: dtype of the base and of matrix products.")
]
BaseKind = Annotated[str, typer.Option("--base", help="full or nf4.")]
Dropout = Annotated[float, typer.Option(min=0, max=0.99, help="Dropout on the adapters' input.")]
Model = Annotated[
    str,
    typer.Option(
        help="Model: smollm2 (that of the demo), random-1b (a Llama with random weights), a folder, GGUF file or hub "
        "id."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Batch size: sequences per batch.")]
Length = Annotated[int, typer.Option(min=2, help="Sequence length in tokens.")]
Labels = Annotated[str, typer.Option(help="all, or the fraction of each sequence's tokens that have a label.")]
Loss = Annotated[
    str,
    typer.Option(
        help="hf: the model's own loss, on the logits of all tokens. chunked: malora_dist's, for every baseline."
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Measured rounds.")]
Warmup = Annotated[int, typer.Option(min=0, help="Warm-up rounds.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of CPU threads. Default: torch's.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:NUMBER.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all records to this JSON file.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the tables to this Markdown file.")]


@bench.command()
def layer(
    context: typer.Context,
    size: Annotated[
        str,
        typer.Option(help="Sizes of linear layers as INPUTSxOUTPUTS, or one number for both; a list measures each."),
    ] = "576,2048,4096,4096x11008,11008x4096",
    tokens: Annotated[str, typer.Option(help="Input tokens; a list measures each.")] = "1024",
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
    """Measure forward and backward of one adapted linear, interleaved: malora_dist, PEFT, dispatched mixtures, base."""
    _run("layer", "LayerOptions", context, Output(as_json, markdown))


@bench.command()
def step(
    context: typer.Context,
    case: Annotated[
        str,
        typer.Option(
            help="step: the plain step. experts: with 8 and 64 experts. tokens: with twice the tokens. optimizer: the "
            "optimizer's step alone."
        ),
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
    """Measure whole training steps of a real model, interleaved: forward, loss, backward and fused AdamW."""
    _run("step", "StepOptions", context, Output(as_json, markdown))


@bench.command()
def memory(
    context: typer.Context,
    model: Model = "smollm2",
    batch: Batch = 4,
    length: Length = 256,
    dtype: Dtype = "bf16",
    base: Annotated[str, typer.Option("--base", help="full, nf4, or both.")] = "full,nf4",
    checkpointing: Annotated[str, typer.Option(help="Gradient checkpointing: off, on, or both.")] = "off,on",
    dropout: Dropout = 0.0,
    labels: Labels = "all",
    loss: Loss = "hf",
    only: Only = None,
    repeats: Annotated[int, typer.Option(min=0, help="Rounds of steps on each base; 0 measures no time.")] = 5,
    warmup: Warmup = 1,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Count the exact peak bytes of tensors in a training step; measure what a 4-bit base saves, and its time."""
    _run("memory", "MemoryOptions", context, Output(as_json, markdown))


@bench.command()
def launches(
    context: typer.Context,
    hidden: Annotated[int, typer.Option(min=16, help="Hidden size of the model, a multiple of 16.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Input tokens.")] = 128,
    dtype: Dtype = "bf16",
    base: BaseKind = "full",
    dropout: Annotated[str, typer.Option(help="Dropout on the adapters' input; a list measures each.")] = "0,0.05",
    only: Annotated[str | None, typer.Option(help="Rows of the table to measure, and the base.")] = None,
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Count kernel launches and host synchronisations on a GPU, for a linear, q, k and v, and a block. Needs no GPU."""
    _run("launches", "LaunchOptions", context, Output(as_json, markdown))


@bench.command()
def roofline(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="config.json, folder or GGUF file. Default: LLaMA-2 7B.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 4096,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 1024,
    base: BaseKind = "full",
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Dropout on the input of every adapter.")] = 0.0,
    attention: Annotated[
        str, typer.Option(help="varlen: attention within each sample. sdpa: over whole rows, with a mask.")
    ] = "varlen",
    flops: Annotated[
        str | None, typer.Option(help="Peak bf16 rate of the device. Default: that of an H100, 989TFLOP/s.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Memory bandwidth of the device. Default: that of an H100, 3.35TB/s.")
    ] = None,
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Compute lower bounds of a step's time from FLOPs and bytes of each kernel (roofline). Needs no GPU."""
    from malora_dist.bench.roofline_tables import RooflineOptions, run

    chosen = {name: value for name, value in _given(context, RooflineOptions).items() if value is not None}
    run(RooflineOptions(**chosen), Output(as_json, markdown))


@bench.command(context_settings=OVERRIDES)
def ep(
    context: typer.Context,
    recipe: Recipe,
    num_gpus: NumGpus = None,
    master_port: MasterPort = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each variant.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Warm-up steps of each variant.")] = 2,
    variants: Annotated[
        str | None, typer.Option(help=f"What to compare, from {','.join(TOPICS)}. Default: all that apply.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write every step of every variant to this JSON file.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this Markdown file.")] = None,
) -> None:
    """Measure step time, bytes and loss of a recipe's variants, interleaved: expert parallelism, overlap, NF4, ZeRO."""
    path, overrides = recipe_first(recipe, context.args)
    config = load_config(path, overrides)
    options = EpOptions(
        recipe=path,
        overrides=tuple(overrides),
        topics=tuple(topic for topic in (variants or "").split(",") if topic),
        steps=steps,
        warmup=warmup,
        output=Output(as_json, markdown),
    )
    options.output.check()
    start(
        lambda: import_module("malora_dist.bench.ep").measure(options),
        MALORA,
        ["bench", "ep", *options.words()],
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
    """Measure tokens per second of a recipe's data pipeline (tokenise, sample, pack) beside training on one process."""
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


def _run(module: str, options: str, context: typer.Context, output: Output) -> None:
    """Run a module of `bench.local`, which may import torch, with the options that the command line gives."""
    loaded = import_module(f"malora_dist.bench.local.{module}")
    made = getattr(loaded, options)
    loaded.run(made(**_given(context, made)), output)


def _given(context: typer.Context, options: Any) -> dict[str, Any]:
    """Return what the command line gives for the fields of a dataclass of options."""
    return {field.name: context.params[field.name] for field in fields(options)}
