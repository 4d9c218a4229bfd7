"""A run's jobs, from their scripts to the queue of a scheduler, and where that is written down."""

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
from malora_dist.launch.jobs import TRAIN, SubmittedJob, append_job
from malora_dist.launch.scheduler import ArrayTasks, JobOptions, JobQueue

STAGES = (TRAIN, "evaluate", "convert")


@dataclass(frozen=True)
class Submission:
    """A job to submit: its script; for an array its tasks, and the runs of its recipes in their order."""

    stage: str
    script: str
    array: str | None = None
    runs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where jobs go: the queue of a scheduler; `name` is the scheduler's, and that of its folder in a run's."""

    name: str
    queue: JobQueue

    def folder(self, run: Path) -> Path:
        """Return the folder of a run that holds its jobs' scripts, recipes, logs and jobs.jsonl."""
        return run / self.name

    def recipe_file(self, config: RunConfig) -> Path:
        """Return where a job's recipe is kept, with every key: no later change of the user's file reaches the job."""
        digest = hashlib.sha256(config_text(config).encode()).hexdigest()[:8]
        return self.folder(Path(config.output_dir)).resolve() / f"recipe-{digest}.yaml"


def chain(
    target: Target,
    options: JobOptions,
    run: Path,
    stages: Sequence[str],
    convert_to: str,
    *,
    trusts_code: bool = False,
) -> list[Submission]:
    """Return the jobs of a run's stages. The options' arguments are training's: the recipe.

    With `trusts_code` that recipe lets code of the base's folder run; the later stages get this as a flag on their
    command lines, since the run's own record must not grant it. Raises ConfigError for what no script can hold.
    """
    of_stage = {TRAIN: options}
    trust = ("--model.trust_remote_code", "true") if trusts_code else ()
    of_stage["evaluate"] = replace(options, name=f"{options.name}-evaluate", arguments=(str(run), *trust))
    recipe = ("--recipe", *(options.arguments or ())) if trusts_code else ()
    words = (str(run), str(run / "export"), "--to", convert_to, *recipe)
    of_stage["convert"] = replace(
        options, name=f"{options.name}-convert", arguments=words, nodes=1, gpus_per_node=0, start="launcher"
    )
    folder = target.folder(run)
    return [
        Submission(stage, target.queue.script(stage, of_stage[stage], folder)) for stage in STAGES if stage in stages
    ]


def array(target: Target, options: JobOptions, runs: Sequence[Path], tasks: str) -> Submission:
    """Return one job for many runs: seeds below one folder, or several recipes. Raises ConfigError as `chain`."""
    below = str(runs[0]) if len(runs) == 1 else None
    script = target.queue.script(TRAIN, options, target.folder(runs[0]), ArrayTasks(tasks, below))
    return Submission(TRAIN, script, tasks, () if below else tuple(runs))


def submit(
    target: Target, jobs: Sequence[Submission], configs: Sequence[RunConfig], flags: Sequence[str]
) -> list[SubmittedJob]:
    """Submit one after another, each to start when the one before has succeeded, and note them in jobs.jsonl.

    Scripts and recipes are kept beside the logs. Raises ConfigError with the scheduler's words if it refuses one, or if
    something cannot be written; those before it are then cancelled, and its notes say which could not be.
    """
    folder = target.folder(Path(configs[0].output_dir))
    submitted: list[SubmittedJob] = []
    try:
        for config in configs:
            target.recipe_file(config).parent.mkdir(parents=True, exist_ok=True)
            write_text(target.recipe_file(config), config_text(config))
        for job in jobs:
            after = submitted[-1].job if submitted else None
            number = target.queue.submit(job.script, flags, os.environ, after)
            submitted.append(_submitted(target, job, number, after, folder))
            _note(target, job, submitted[-1], folder)
    except (MaloraError, OSError) as error:
        refused = error if isinstance(error, MaloraError) else ConfigError(f"{folder} cannot be written: {error}")
        for one in submitted:
            refused.add_note(f"job {one.job} ({one.stage}), submitted before that, {_cancelled(target, one)}")
        raise refused from error
    return submitted


def _cancelled(target: Target, one: SubmittedJob) -> str:
    """Cancel a job; return in words whether it is."""
    try:
        target.queue.cancel(one.job, os.environ)
    except MaloraError as error:
        return f"could not be cancelled ({error}); end it yourself: {target.queue.cancel_command(one.job)}"
    return "is cancelled"


def dry_run(target: Target, jobs: Sequence[Submission], configs: Sequence[RunConfig], flags: Sequence[str]) -> str:
    """Return the commands, scripts and recipes that `submit` would hand to the scheduler."""
    parts = []
    for index, job in enumerate(jobs):
        words = target.queue.submit_command(flags, "JOB" if index else None)
        parts.append(f"$ {shlex.join(words)} <<'SCRIPT'\n{job.script}SCRIPT\n")
    parts += [f"# {target.recipe_file(config)}\n{config_text(config)}" for config in configs]
    return "\n".join(parts)


def _submitted(target: Target, job: Submission, number: str, after: str | None, folder: Path) -> SubmittedJob:
    return SubmittedJob(
        job=number,
        stage=job.stage,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        log=str(target.queue.log(job.stage, number, folder, array=job.array is not None)),
        script=str(folder / f"{job.stage}_{number}{target.queue.script_suffix}"),
        after=after,
        array=job.array,
        scheduler=target.name,
    )


def _note(target: Target, job: Submission, submitted: SubmittedJob, folder: Path) -> None:
    write_text(Path(submitted.script), job.script)
    if not job.runs:
        append_job(folder, submitted)
    for task, run in enumerate(job.runs, start=1):
        number, log = f"{submitted.job}_{task}", submitted.log.replace("%a", str(task))
        append_job(target.folder(run), replace(submitted, job=number, log=log, array=None))
