"""The command `malora`. Each verb is a few lines over the package; only those that load a model import torch."""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from malora_dist import __version__
from malora_dist.bench.app import Json, Markdown, Repeats, Warmup, bench
from malora_dist.bench.local.output import Output
from malora_dist.bench.variants import TOPICS, recipe_variant
from malora_dist.cli.cluster.app import launch
from malora_dist.cli.local_base import base_notes, family_targets
from malora_dist.config import NEW_RUN, load_config
from malora_dist.config.compatibility import check_plan, suggest_world_sizes
from malora_dist.config.summary import adapter_spec, missing_files, summary_table
from malora_dist.config.template import recipe_text
from malora_dist.console.terminal import forgive_output
from malora_dist.convert.command import EPILOG
from malora_dist.convert.command import command as convert_command
from malora_dist.errors import ConfigError, MaloraError
from malora_dist.launch.files import write_new_files
from malora_dist.launch.start import recipe_first, start

app = typer.Typer(
    name="malora",
    help="Fine-tune a language model on many tasks with MALoRA, on one machine or a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(launch, name="launch")
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
OVERRIDES_HELP = "Settings of the recipe follow it: --adapter.r 16 --train.learning_rate=5e-4"

Recipe = Annotated[str, typer.Argument(metavar="RECIPE.yaml", show_default=False, help=OVERRIDES_HELP)]
NumGpus = Annotated[
    int | None,
    typer.Option("--num_gpus", "--num-gpus", min=1, help="Processes, one for each GPU. Default: all visible GPUs."),
]
MasterPort = Annotated[
    int | None,
    typer.Option(
        "--master_port", "--master-port", min=1, max=65535, help="Where processes meet. Default: a free port."
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A MaloraError is one red message and exit code 2; --traceback anywhere shows where."""
    forgive_output()
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in given
    try:
        app([argument for argument in given if argument != "--traceback"])
    except MaloraError as error:
        if show_traceback:
            raise
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"malora_dist {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fine-tune a language model on many tasks with MALoRA, on one machine or a cluster."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    with_cluster_files: Annotated[
        bool, typer.Option("--with-cluster-files", help="Write ds_configs/, launchers/ and slurm/ beside it too.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Base model: hub id, folder or .gguf file.")] = None,
) -> None:
    """Write a commented recipe to start from. Nothing is ever overwritten."""
    console = Console()
    targets = None if model is None else family_targets(model)
    for written in write_new_files(path, recipe_text(model, targets), with_cluster_files=with_cluster_files):
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


@app.command(context_settings=OVERRIDES)
def validate(
    context: typer.Context,
    recipe: Recipe,
    world_size: Annotated[
        int | None, typer.Option("--world-size", "--world_size", min=1, help="Number of processes to check for.")
    ] = None,
) -> None:
    """Check a recipe: names, values, batch arithmetic, whether the plan can run, and the model if it is here.

    No weight is read.
    """
    config = load_config(*recipe_first(recipe, context.args))
    worlds = suggest_world_sizes(config)
    plan = check_plan(config, world_size or (worlds[0] if worlds else 1))
    said_of_base = base_notes(config)
    console = Console()
    console.print(Text(f"{recipe} is valid", style="green"), soft_wrap=True)
    console.print(summary_table(config, plan, worlds, world_size_given=world_size is not None))
    notes = [*(plan.notes if world_size is not None else ()), *missing_files(config), *said_of_base]
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


@app.command(context_settings=OVERRIDES)
def prepare(context: typer.Context, recipe: Recipe) -> None:
    """Fetch the model, tokenise the tasks and quantise the base once, without a GPU; runs then start from that."""
    path, overrides = recipe_first(recipe, context.args)
    raise typer.Exit(import_module("malora_dist.prepare").main([path, *overrides]))


@app.command(context_settings=OVERRIDES)
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
    """Memory, traffic and time of a run before it starts, what fits, and what is fastest. Needs no GPU and no weights.

    Nor torch for models laid out as Llama, Mistral and Qwen 2 and 3 are; others are built empty by transformers.
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


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    recipe: Recipe,
    num_gpus: NumGpus = None,
    master_port: MasterPort = None,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Start anew beside a run in output_dir, instead of going on with it.")
    ] = False,
) -> None:
    """Train, or go on with the unfinished run in output_dir.

    Outside a launcher, several GPUs are used through `deepspeed`; --num_gpus 1 trains in this process.
    """
    path, overrides = recipe_first(recipe, context.args)
    overrides += [NEW_RUN] if new_run else []
    config = load_config(path, overrides)
    start("malora_dist.train", [path, *overrides], num_gpus, config, master_port)


@app.command(context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    run_dir: Annotated[str | None, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="An adapter folder, instead of a run.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="Its base model and tasks.")] = None,
    num_gpus: NumGpus = None,
    master_port: MasterPort = None,
) -> None:
    """Measure accuracy for each task: of a run, or of an adapter with a recipe."""
    overrides = list(context.args)
    if run_dir is not None and run_dir.startswith("--"):
        overrides, run_dir = [run_dir, *overrides], None
    if (run_dir is None) == (adapter is None):
        raise ConfigError("give either RUN_DIR, or --adapter DIR with --recipe RECIPE")
    if (adapter is None) != (recipe is None):
        raise ConfigError("--adapter DIR and --recipe RECIPE belong together")
    chosen = [run_dir] if run_dir is not None else ["--adapter", str(adapter), "--recipe", str(recipe)]
    start("malora_dist.evaluate", [*chosen, *overrides], num_gpus, None, master_port)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write the run's report: one HTML file with tables and pictures."""
    if not run_dir.is_dir():
        raise ConfigError(f"RUN_DIR={run_dir} is not a folder")
    written = import_module("malora_dist.report").write_report(run_dir)
    Console().print(Text(f"wrote {written}"), soft_wrap=True)


app.command(name="convert", epilog=EPILOG)(convert_command)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, checkpoint, adapter (PEFT's too), model or DeepSpeed folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say what a folder is: method, numbers, counts, norms of experts, and damage. Exit code 1 if there is damage."""
    facts = import_module("malora_dist.cli.inspect.look").inspect(path)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        for line in import_module("malora_dist.cli.inspect.lines").lines(facts):
            Console().print(Text(line), soft_wrap=True)
    raise typer.Exit(1 if facts["damaged"] else 0)


@bench.command(name="ep", context_settings=OVERRIDES)
def bench_ep(
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
    """Step time, bytes and loss with experts spread or not, overlap, 4-bit base, ZeRO stages; variants take turns."""
    path, overrides = recipe_first(recipe, context.args)
    config = load_config(path, overrides)
    given = {"--steps": steps, "--warmup": warmup, "--variants": variants, "--json": as_json, "--markdown": markdown}
    options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    start(
        "malora_dist.bench.run", [path, *options, *overrides], num_gpus, recipe_variant(config).of(config), master_port
    )


@bench.command(name="data", context_settings=OVERRIDES)
def bench_data(
    context: typer.Context,
    recipe: Recipe,
    repeats: Repeats = 5,
    warmup: Warmup = 2,
    as_json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Tokens a second of a recipe's data: tokenised, drawn and packed, against those of its training on one process."""
    path, overrides = recipe_first(recipe, context.args)
    loaded = import_module("malora_dist.bench.local.data_rate")
    options = loaded.DataOptions(recipe=path, overrides=tuple(overrides), repeats=repeats, warmup=warmup)
    raise typer.Exit(loaded.main(options, Output(as_json, markdown)))
