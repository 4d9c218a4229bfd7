"""Runs as they lie there once submitted, and the command that is called on them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from malora_dist.launch.jobs import SubmittedJob, append_job
from tests.commands import malora

launch = partial(malora, "launch")


def submitted(run: Path, *jobs: SubmittedJob) -> Path:
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    for job in jobs:
        append_job(run / "slurm", job)
    return run


def job(number: str, run: Path, stage: str = "train", **more: Any) -> SubmittedJob:
    log = run.resolve() / "slurm" / f"{stage}_{number}.out"
    return replace(SubmittedJob(number, stage, "2026-11-25T08:30:00+0000", str(log), f"{stage}.sbatch"), **more)
