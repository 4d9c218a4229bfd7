"""A run's jobs, from their scripts to Slurm's queue, and where that is written down."""

import hashlib
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from malora_dist.config import RunConfig, config_text
from malora_dist.errors import ConfigError, MaloraError
from malora_dist.files.atomic import write_text
from malora_dist.launch.jobs import SLURM_FOLDER, TRAIN, Job, append_job
from malora_dist.launch.slurm.sbatch import cancel, sbatch
from malora_dist.launch.slurm.script import JobOptions, array_script, convert_script, evaluate_script, train_script

STAGES = (TRAIN, "evaluate", "convert")


@dataclass(frozen=True)
class Stage:
    """A job to submit: its script; for an array its tasks, and the runs of its recipes in their order."""

    name: str
    script: str
    array: str | None = None
    runs: tuple[Path, ...] = ()

    def flags(self, flags: Sequence[str], after: str | None) -> list[str]:
        """sbatch's command line. A job whose predecessor fails is cancelled instead of waiting for ever."""
        chained = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        return [*chained, *flags]


def recipe_file(config: RunConfig) -> Path:
    """Where a job's recipe is kept, every key of it, so that no later change of the user's file reaches the job."""
    digest = hashlib.sha256(config_text(config).encode()).hexdigest()[:8]
    return (Path(config.output_dir) / SLURM_FOLDER).resolve() / f"recipe-{digest}.yaml"


def chain(
    options: JobOptions, run: Path, stages: Sequence[str], convert_to: str, *, trusts_code: bool = False
) -> list[Stage]:
    """The scripts of a run's stages. The options' arguments are training's: the recipe.

    With `trusts_code` that recipe lets code of the base's folder run, which the later stages are told on their command
    lines: a run's own word would not do. Raises ConfigError as train_script.
    """
    made = [Stage(TRAIN, train_script(_placed(options, run, TRAIN)))] if TRAIN in stages else []
    if "evaluate" in stages:
        trust = ("--model.trust_remote_code", "true") if trusts_code else ()
        evaluate = replace(options, name=f"{options.name}-evaluate", arguments=(str(run), *trust))
        made.append(Stage("evaluate", evaluate_script(_placed(evaluate, run, "evaluate"))))
    if "convert" in stages:
        recipe = ("--recipe", *(options.arguments or ())) if trusts_code else ()
        words = (str(run), str(run / "export"), "--to", convert_to, *recipe)
        one = replace(
            options, name=f"{options.name}-convert", arguments=words, nodes=1, gpus_per_node=0, start="launcher"
        )
        made.append(Stage("convert", convert_script(_placed(one, run, "convert"))))
    return made


def array(options: JobOptions, runs: Sequence[Path], tasks: str) -> Stage:
    """One script for many runs: seeds below one folder, or several recipes. Raises ConfigError as train_script."""
    placed = _placed(options, runs[0], TRAIN, array=True)
    if len(runs) == 1:
        return Stage(TRAIN, array_script(placed, tasks=tasks, output_dir=str(runs[0])), tasks)
    return Stage(TRAIN, array_script(placed, tasks=tasks), tasks, tuple(runs))


def submit(stages: Sequence[Stage], configs: Sequence[RunConfig], flags: Sequence[str]) -> list[Job]:
    """Submit one after another, each to start when the one before has succeeded, and note them in jobs.jsonl.

    Scripts and recipes are kept beside the logs. Raises ConfigError with Slurm's words if it refuses one, or if
    something cannot be written; those before it are then cancelled.
    """
    folder = Path(configs[0].output_dir) / SLURM_FOLDER
    jobs: list[Job] = []
    try:
        for config in configs:
            recipe_file(config).parent.mkdir(parents=True, exist_ok=True)
            write_text(recipe_file(config), config_text(config))
        for stage in stages:
            after = jobs[-1].job if jobs else None
            jobs.append(_job(stage, sbatch(stage.script, stage.flags(flags, after), os.environ), after, folder))
            _note(stage, jobs[-1], folder)
    except (MaloraError, OSError) as error:
        refused = error if isinstance(error, MaloraError) else ConfigError(f"{folder} cannot be written: {error}")
        for job in jobs:
            cancel(job.job, os.environ)
            refused.add_note(f"job {job.job} ({job.stage}), submitted before that, is cancelled")
        raise refused from error
    return jobs


def dry_run(stages: Sequence[Stage], configs: Sequence[RunConfig], flags: Sequence[str]) -> str:
    """The commands, scripts and recipes that `submit` would hand to Slurm."""
    parts = []
    for index, stage in enumerate(stages):
        words = ["sbatch", "--parsable", *stage.flags(flags, "JOB" if index else None)]
        parts.append(f"$ {shlex.join(words)} <<'SCRIPT'\n{stage.script}SCRIPT\n")
    parts += [f"# {recipe_file(config)}\n{config_text(config)}" for config in configs]
    return "\n".join(parts)


def _job(stage: Stage, number: str, after: str | None, folder: Path) -> Job:
    log = folder.resolve() / (f"{stage.name}_{number}_%a.out" if stage.array else f"{stage.name}_{number}.out")
    return Job(
        job=number,
        stage=stage.name,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        log=str(log),
        script=str(folder / f"{stage.name}_{number}.sbatch"),
        after=after,
        array=stage.array,
    )


def _note(stage: Stage, job: Job, folder: Path) -> None:
    write_text(Path(job.script), stage.script)
    if not stage.runs:
        append_job(folder, job)
    for task, run in enumerate(stage.runs, start=1):
        one = replace(job, job=f"{job.job}_{task}", log=job.log.replace("%a", str(task)), array=None)
        append_job(run / SLURM_FOLDER, one)


def _placed(options: JobOptions, run: Path, stage: str, *, array: bool = False) -> JobOptions:
    """With its logs in the run's folder. sbatch takes % in a path for a placeholder."""
    folder = (run / SLURM_FOLDER).resolve()
    number = "%A_%a" if array else "%j"
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    output = f"{str(folder).replace('%', '%%')}/{stage}_{number}.out"
    return replace(options, output=output, logs=f'{shlex.quote(str(folder))}/"ranks_{own}"')
