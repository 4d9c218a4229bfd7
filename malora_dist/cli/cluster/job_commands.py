"""`malora launch begin` and `end`, which job scripts call around their processes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from malora_dist.config import RunConfig, load_config
from malora_dist.config.compatibility import check_plan
from malora_dist.errors import ConfigError, TopologyError
from malora_dist.launch.restarts import begin, end
from malora_dist.launch.scheduler import RunningJob
from malora_dist.launch.schedulers import job_of

Recipe = Annotated[str, typer.Argument(metavar="RECIPE.yaml", show_default=False)]


def begin_command(context: typer.Context, recipe: Recipe) -> None:
    """Used by job scripts: check the recipe and the job and count the start. Exit code 2 if it must not start."""
    config = job_config(recipe, context.args)
    job = job_of(os.environ)
    world_size = _processes(job, os.environ)
    check_plan(config, world_size)
    now = begin(Path(config.output_dir), job.id)
    print(f"job {job.id}, start {now.starts}: {config.output_dir} on {job.nodes}, {world_size} processes")


def end_command(context: typer.Context, recipe: Recipe) -> None:
    """Used by job scripts after the processes have ended: exit code 75 if the job must be started again."""
    config = job_config(recipe, context.args)
    decision = end(
        Path(config.output_dir),
        job_of(os.environ).id,
        config.launch.max_restarts,
        stop_after_steps=config.train.stop_after_steps,
        exit_code=_left_code(os.environ),
    )
    print(decision.why)
    raise typer.Exit(decision.code)


def job_config(recipe: str, overrides: list[str]) -> RunConfig:
    """Return the recipe of a job that may start several times. Raises ConfigError for a mistake in it."""
    if recipe.startswith("-"):
        raise ConfigError(f"the recipe must come before its settings: RECIPE.yaml {recipe} ...")
    if "--new-run" in overrides:
        raise ConfigError("--new-run: a job that is restarted must resume its run; give another --output_dir")
    config = load_config(recipe, overrides)
    if config.train.resume_from_checkpoint is None:
        raise ConfigError(
            "train.resume_from_checkpoint=None: a job that is restarted must resume its run; remove it, and give a new "
            "run another output_dir"
        )
    return config


def _processes(job: RunningJob, environment: Mapping[str, str]) -> int:
    """Return the processes of all nodes, as the job script starts them.

    Raises TopologyError if a node has fewer GPUs than processes.
    """
    # Of each node; the job script counts them.
    processes = int(environment["PROCESSES"]) if environment.get("PROCESSES", "").isdigit() else 0
    if 0 < job.gpus_per_node < processes:
        raise TopologyError(
            f"{processes} processes on each node, and {job.gpus_variable}={job.gpus_per_node}: give --gpus-per-node "
            "the same number, and --ntasks-per-node too where each process is a task"
        )
    return max(1, job.num_nodes) * max(1, processes)


def _left_code(environment: Mapping[str, str]) -> int | None:
    """Return the exit code that a process has left for the job script, see `training.process`."""
    path = Path(environment.get("MALORA_EXIT_CODE", ""))
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
