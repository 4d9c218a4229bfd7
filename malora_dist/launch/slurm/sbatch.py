"""Submitting scripts with sbatch, and ending jobs with scancel."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from malora_dist.errors import ConfigError

SECONDS = 60
# What scancel says of a job that it need not end.
HAS_ENDED = ("invalid job id", "already completing or completed")
# Variables that a job's script sets; a job submitted from within another must not inherit them.
OF_A_JOB = ("NPROC_PER_NODE", "PROCESSES", "CUDA_VISIBLE_DEVICES", "LOGS", "MALORA_EXIT_CODE", "OMP_NUM_THREADS")


def sbatch_command(flags: Sequence[str]) -> list[str]:
    """Return the words that submit a script from standard input."""
    return ["sbatch", "--parsable", *flags]


def sbatch(script: str, flags: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> str:
    """Submit a script to run in `folder` (default: the current directory), and return the job's number.

    Raises ConfigError with Slurm's own message if it refuses, or does not answer.
    """
    command = sbatch_command(flags)
    # sbatch would take the numbers of the surrounding job for options of the new one.
    outside = {
        key: value
        for key, value in environment.items()
        if key == "SLURM_CONF" or not key.startswith(("SLURM_", "SRUN_", "SLURMD_"))
    }
    if "SLURM_JOB_ID" in environment:
        outside = {key: value for key, value in outside.items() if key not in OF_A_JOB}
    done = _run(command, script, outside, folder)
    said = done.stdout.strip()
    if done.returncode or not re.fullmatch(r"\d+(;.*)?", said.splitlines()[-1] if said else ""):
        raise ConfigError(f"sbatch refuses the job: {(done.stderr or said).strip() or f'exit code {done.returncode}'}")
    return said.splitlines()[-1].partition(";")[0]


def cancel(job: str, environment: Mapping[str, str]) -> None:
    """End a job, if Slurm still has it. Raises ConfigError with Slurm's message if it refuses or does not answer."""
    done = _run(["scancel", job], "", environment, None)
    said = done.stderr.strip()
    if done.returncode and not any(words in said.lower() for words in HAS_ENDED):
        raise ConfigError(f"scancel refuses: {said or f'exit code {done.returncode}'}")


def _run(
    command: Sequence[str], stdin: str, environment: Mapping[str, str], folder: Path | None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=stdin,
            env=dict(environment),
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot run {command[0]}: {error.strerror}; is this a login node of a Slurm cluster?"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]} does not answer within {SECONDS} s; see whether it took the job: squeue --me"
        ) from error
