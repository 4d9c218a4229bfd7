"""A run's jobs, from their scripts to Slurm's queue, and where that is written down."""

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from malora_dist.atomic import write_text
from malora_dist.errors import ConfigError, MaloraError
from malora_dist.launch.jobs import SLURM_FOLDER, TRAIN, append_job
from malora_dist.launch.jobs import Job as SubmittedJob
from malora_dist.launch.sbatch import cancel, sbatch
from malora_dist.launch.script import Job, array_script, convert_script, evaluate_script, train_script

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


def chain(job: Job, run: Path, stages: Sequence[str], convert_to: str) -> list[Stage]:
    """The scripts of a run's stages. `job.arguments` are those of training. Raises ConfigError as train_script."""
    made = [Stage(TRAIN, train_script(_placed(job, run, TRAIN)))]
    if "evaluate" in stages:
        evaluate = replace(job, name=f"{job.name}-evaluate", arguments=(str(run),))
        made.append(Stage("evaluate", evaluate_script(_placed(evaluate, run, "evaluate"))))
    if "convert" in stages:
        words = (str(run), str(run / "export"), "--to", convert_to)
        one = replace(job, name=f"{job.name}-convert", arguments=words, nodes=1, gpus_per_node=0, start="launcher")
        made.append(Stage("convert", convert_script(_placed(one, run, "convert"))))
    return made


def array(job: Job, runs: Sequence[Path], tasks: str) -> Stage:
    """One script for many runs: seeds below one folder, or several recipes. Raises ConfigError as train_script."""
    placed = _placed(job, runs[0], TRAIN, array=True)
    if len(runs) == 1:
        return Stage(TRAIN, array_script(placed, tasks=tasks, output_dir=str(runs[0])), tasks)
    return Stage(TRAIN, array_script(placed, tasks=tasks), tasks, tuple(runs))


def submit(stages: Sequence[Stage], run: Path, flags: Sequence[str]) -> list[SubmittedJob]:
    """Submit one after another, each to start when the one before has succeeded, and note them in jobs.jsonl.

    Scripts are kept beside the logs. Raises ConfigError with Slurm's words if it refuses one; those before it are then
    cancelled.
    """
    folder = run / SLURM_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={run} cannot be written: {error.strerror}") from error
    jobs: list[SubmittedJob] = []
    try:
        for stage in stages:
            after = jobs[-1].job if jobs else None
            number = sbatch(stage.script, stage.flags(flags, after), os.environ)
            jobs.append(_noted(stage, number, after, folder))
    except MaloraError as error:
        for job in jobs:
            cancel(job.job, os.environ)
            error.add_note(f"job {job.job} ({job.stage}), submitted before it, is cancelled")
        raise
    return jobs


def dry_run(stages: Sequence[Stage], flags: Sequence[str]) -> str:
    """The commands and scripts that `submit` would hand to Slurm."""
    parts = []
    for index, stage in enumerate(stages):
        words = ["sbatch", "--parsable", *stage.flags(flags, "JOB" if index else None)]
        parts.append(f"$ {shlex.join(words)} <<'SCRIPT'\n{stage.script}SCRIPT\n")
    return "\n".join(parts)


def _noted(stage: Stage, number: str, after: str | None, folder: Path) -> SubmittedJob:
    script = folder / f"{stage.name}_{number}.sbatch"
    log = folder.resolve() / (f"{stage.name}_{number}_%a.out" if stage.array else f"{stage.name}_{number}.out")
    job = SubmittedJob(
        job=number,
        stage=stage.name,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        log=str(log),
        script=str(script),
        after=after,
        array=stage.array,
    )
    write_text(script, stage.script)
    if not stage.runs:
        append_job(folder, job)
    for task, run in enumerate(stage.runs, start=1):
        (run / SLURM_FOLDER).mkdir(parents=True, exist_ok=True)
        one = replace(job, job=f"{number}_{task}", log=job.log.replace("%a", str(task)), array=None)
        append_job(run / SLURM_FOLDER, one)
    return job


def _placed(job: Job, run: Path, stage: str, *, array: bool = False) -> Job:
    """With its logs in the run's folder. sbatch takes % in a path for a placeholder."""
    folder = (run / SLURM_FOLDER).resolve()
    number = "%A_%a" if array else "%j"
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    output = f"{str(folder).replace('%', '%%')}/{stage}_{number}.out"
    return replace(job, output=output, logs=f'{shlex.quote(str(folder))}/"ranks_{own}"')
