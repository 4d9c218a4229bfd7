"""Runs as they lie there once submitted, and the command that is called on them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from malora_dist.launch.jobs import SLURM_FOLDER, Job, append_job
from tests.commands import malora

launch = partial(malora, "launch")


def submitted(run: Path, *jobs: Job) -> Path:
    (run / SLURM_FOLDER).mkdir(parents=True, exist_ok=True)
    for job in jobs:
        append_job(run / SLURM_FOLDER, job)
    return run


def job(number: str, run: Path, stage: str = "train", **more: Any) -> Job:
    log = run.resolve() / SLURM_FOLDER / f"{stage}_{number}.out"
    return replace(Job(number, stage, "2026-11-25T08:30:00+0000", str(log), f"{stage}.sbatch"), **more)
