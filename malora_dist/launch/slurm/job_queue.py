"""Slurm's queue behind the interface of all schedulers."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from malora_dist.errors import ConfigError
from malora_dist.launch.scheduler import ArrayTasks, JobOptions, JobQueue, JobState
from malora_dist.launch.slurm.flags import check_flags
from malora_dist.launch.slurm.queue import job_states
from malora_dist.launch.slurm.sbatch import cancel, sbatch, sbatch_command
from malora_dist.launch.slurm.script import (
    ScriptOptions,
    array_script,
    convert_script,
    evaluate_script,
    train_script,
)
from malora_dist.launch.slurm.time_limit import check_save_before

SCRIPTS = {"train": train_script, "evaluate": evaluate_script, "convert": convert_script}


class SlurmQueue(JobQueue):
    """sbatch, squeue, sacct and scancel."""

    script_suffix: ClassVar[str] = ".sbatch"

    def check(self, options: JobOptions, flags: Sequence[str]) -> None:
        check_flags("after --", flags)
        check_flags("in launch.sbatch", options.sbatch)
        check_save_before(options.time, options.save_before)
        if options.gpu_type is not None and not re.fullmatch(r"[\w.-]+", options.gpu_type):
            raise ConfigError(f"--gpu-type={options.gpu_type}: must be Slurm's name of a GPU, such as a100")

    def script(self, stage: str, options: JobOptions, folder: Path, array: ArrayTasks | None = None) -> str:
        placed = _placed(options, stage, folder.resolve(), array=array is not None)
        if array is not None:
            return array_script(placed, tasks=array.numbers, output_dir=array.output_dir)
        return SCRIPTS[stage](placed)

    def log(self, stage: str, job: str, folder: Path, *, array: bool) -> Path:
        return folder.resolve() / (f"{stage}_{job}_%a.out" if array else f"{stage}_{job}.out")

    def submit_command(self, flags: Sequence[str], after: str | None = None) -> list[str]:
        return sbatch_command([*_chained(after), *flags])

    def submit(
        self, script: str, flags: Sequence[str], environment: Mapping[str, str], after: str | None = None
    ) -> str:
        return sbatch(script, [*_chained(after), *flags], environment)

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        return job_states(jobs)

    def cancel(self, job: str, environment: Mapping[str, str]) -> None:
        cancel(job, environment)

    def cancel_command(self, job: str) -> str:
        return f"scancel {job}"


def _chained(after: str | None) -> list[str]:
    """Return sbatch's flags to start after a job, and to be cancelled, not to wait for ever, if that one fails."""
    return [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]


def _placed(options: JobOptions, stage: str, folder: Path, *, array: bool) -> ScriptOptions:
    """Return the options with the job's logs in `folder`; sbatch takes % in a path for a placeholder."""
    number = "%A_%a" if array else "%j"
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    output = f"{str(folder).replace('%', '%%')}/{stage}_{number}.out"
    return ScriptOptions(**asdict(options), output=output, logs=f'{shlex.quote(str(folder))}/"ranks_{own}"')
