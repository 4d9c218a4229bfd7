"""`malora launch slurm`, and of every scheduler with a queue: a recipe as jobs, checked before they are submitted."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from malora_dist.cli.cluster.checks import check_no_job, checked_recipe, memory_note
from malora_dist.cli.cluster.submission import STAGES, Submission, Target, array, chain, dry_run, submit
from malora_dist.config import RunConfig
from malora_dist.config.summary import missing_files
from malora_dist.convert.kinds import find_kind
from malora_dist.errors import ConfigError
from malora_dist.launch.jobs import TRAIN, SubmittedJob
from malora_dist.launch.scheduler import JobOptions
from malora_dist.launch.schedulers import queues

TASKS = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
# CPUs of a process, by default: loading and checkpoints use several.
CPUS = 4
ARRAY_HELP = (
    "Submit a job array. seeds=1-5: one run per seed. recipes=B.yaml,C.yaml: one run per recipe, in addition to RECIPE."
)


class WithFlags(TyperCommand):
    """A command whose words after `--` are flags for another program, in `context.meta["flags"]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Split at the first `--`."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["flags"] = args[end + 1 :]
        return list(super().parse_args(ctx, args[:end]))


def submit_command(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node; 0 requests none.")] = 8,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes per node. Default: one for each GPU.")
    ] = None,
    gpu_type: Annotated[str | None, typer.Option(help="GPU type, by the cluster's name, such as a100.")] = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option(min=1, help=f"CPUs per node, or per process with --start tasks. Default: {CPUS} per process."),
    ] = None,
    time: Annotated[
        str, typer.Option(help="Time limit of each start of the job; the job is requeued and resumes after it.")
    ] = "24:00:00",
    save_before: Annotated[
        int,
        typer.Option(
            min=1, help="Seconds before the time limit at which the run saves; a scheduler may be a minute late."
        ),
    ] = 300,
    name: Annotated[str | None, typer.Option(help="Job name. Default: the name of output_dir.")] = None,
    tasks: Annotated[str | None, typer.Option("--array", metavar="WHAT=...", help=ARRAY_HELP)] = None,
    after: Annotated[
        str, typer.Option(help=f"Stages to submit; each starts after the one before has succeeded: {','.join(STAGES)}.")
    ] = "train",
    convert_to: Annotated[
        str, typer.Option("--convert-to", help="Kind that the stage convert writes, to export/ of the run folder.")
    ] = "adapter",
    start: Annotated[
        str, typer.Option(help="launcher: one torchrun per node. tasks: the scheduler starts each process.")
    ] = "launcher",
    model: Annotated[
        str | None, typer.Option(help="config.json of the base model, if the model is not on this machine.")
    ] = None,
    hbm: Annotated[str, typer.Option(help="GPU memory that the plan must fit into.")] = "80GiB",
    only_print: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted and exit.")] = False,
) -> None:
    """Train on a cluster: submit a job that saves, is requeued and resumes. Flags of the scheduler follow `--`."""
    flags: list[str] = context.meta["flags"]
    target = Target(str(context.info_name), queues()[str(context.info_name)])
    wanted, numbers = _stages(after), _array(tasks)
    processes = processes_per_node or gpus_per_node or 1
    options = JobOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu_type=gpu_type,
        processes=processes_per_node,
        cpus_per_task=cpus_per_task or CPUS * (1 if start == "tasks" else processes),
        time=time,
        save_before=save_before,
        start=_start(start),
    )
    target.queue.check(options, flags)
    find_kind(convert_to)
    recipes = [recipe, *(numbers.others if numbers else ())]
    configs = [checked_recipe(path, context.args, nodes * processes, trains=TRAIN in wanted) for path in recipes]
    notes = _fits(configs, nodes, gpus_per_node, hbm, model)
    options = _of_recipes(target, options, configs, name)
    target.queue.check(options, flags)
    run = Path(configs[0].output_dir)
    jobs = (
        chain(target, options, run, wanted, convert_to, trusts_code=configs[0].model.trust_remote_code)
        if numbers is None
        else [_array_job(target, options, configs, numbers, wanted)]
    )
    if only_print:
        print(dry_run(target, jobs, configs, flags))
        return
    for config in configs if TRAIN in wanted else ():
        check_no_job(Path(config.output_dir))
    _print_jobs(target, submit(target, jobs, configs, flags), run, notes)


def _of_recipes(target: Target, options: JobOptions, configs: Sequence[RunConfig], name: str | None) -> JobOptions:
    """Return the options with the first recipe's settings of its site."""
    site = configs[0].launch
    return replace(
        options,
        name=name or Path(configs[0].output_dir).name,
        setup=site.setup,
        sbatch=site.sbatch,
        srun=site.srun,
        arguments=tuple(str(target.recipe_file(config)) for config in configs),
    )


def _stages(text: str) -> list[str]:
    """Return the stages that --after names, in the order in which they run. Raises ConfigError for an unknown one."""
    named = [part.strip() for part in text.split(",") if part.strip()]
    for stage in named or [""]:
        if stage not in STAGES:
            raise ConfigError(f"--after={text}: {stage!r} is none of {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in named]


def _start(text: str) -> Literal["launcher", "tasks"]:
    if text == "launcher":
        return "launcher"
    if text == "tasks":
        return "tasks"
    raise ConfigError(f"--start={text}: must be launcher or tasks")


@dataclass(frozen=True)
class _Array:
    """Numbers of tasks: seeds, or 1 to the number of recipes."""

    numbers: str
    others: tuple[str, ...] = ()


def _array(text: str | None) -> _Array | None:
    if text is None:
        return None
    what, _, value = text.partition("=")
    if what == "seeds" and TASKS.fullmatch(value):
        return _Array(value)
    others = tuple(part.strip() for part in value.split(",") if part.strip())
    if what == "recipes" and others:
        return _Array(f"1-{1 + len(others)}", others)
    raise ConfigError(
        f"--array={text}: must be seeds=1-5 (or 1,3,9, or 1-9%2 for two at a time) or recipes=B.yaml,C.yaml"
    )


def _fits(configs: Sequence[RunConfig], nodes: int, gpus_per_node: int, hbm: str, model: str | None) -> list[str]:
    """Return notes for the user. Raises ConfigError if a plan does not fit."""
    notes = [note for config in configs for note in missing_files(config)]
    if gpus_per_node:
        notes += [memory_note(config, nodes, gpus_per_node, hbm, model) for config in configs]
    return list(dict.fromkeys(notes))


def _array_job(
    target: Target, options: JobOptions, configs: Sequence[RunConfig], numbers: _Array, stages: Sequence[str]
) -> Submission:
    if stages != ["train"]:
        raise ConfigError(f"--after {','.join(stages)} with --array: submit the stages of each run when it is finished")
    runs = [Path(config.output_dir) for config in configs]
    if len(set(runs)) < len(runs):
        raise ConfigError(f"--array: recipes share an output_dir: {', '.join(map(str, runs))}; each run needs its own")
    return array(target, options, runs, numbers.numbers)


def _print_jobs(target: Target, jobs: Sequence[SubmittedJob], run: Path, notes: Sequence[str]) -> None:
    console = Console()
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    lines = [f"submitted {job.stage} as job {job.job}{_waits_for(job)}; log {job.log}" for job in jobs]
    folder = shlex.quote(str(run))
    lines += [f"follow it:  malora launch follow {folder}", f"see it:     malora launch status {folder}"]
    end = target.queue.cancel_command(jobs[0].job)
    lines.append(f"cancel it:  {end}      (it saves if it gets the time; the same command resumes it)")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _waits_for(job: SubmittedJob) -> str:
    return f", after job {job.after}" if job.after else ""
