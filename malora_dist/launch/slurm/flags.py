"""Flags of sbatch that a submission gives itself, and with which option."""

from collections.abc import Sequence

from malora_dist.errors import ConfigError

# Flags of sbatch, long and short, and the option of malora launch slurm that stands for each.
LOGS, FIXED = "nothing: logs are in the run's folder", "nothing: the job script expects its own"
OWN_FLAGS = {
    "nodes": "--nodes", "N": "--nodes", "gpus-per-node": "--gpus-per-node and --gpu-type", "gpus": "--gpus-per-node",
    "G": "--gpus-per-node", "gpus-per-task": "--gpus-per-node", "ntasks": "--processes-per-node",
    "n": "--processes-per-node", "ntasks-per-node": "--processes-per-node", "ntasks-per-gpu": "--processes-per-node",
    "cpus-per-task": "--cpus-per-task", "c": "--cpus-per-task", "time": "--time", "t": "--time", "array": "--array",
    "a": "--array", "dependency": "--after", "d": "--after", "job-name": "--name", "J": "--name",
    "signal": "--save-before", "output": LOGS, "o": LOGS, "error": LOGS, "e": LOGS, "open-mode": LOGS,
    "parsable": FIXED, "wrap": FIXED, "chdir": FIXED, "D": FIXED, "export": FIXED,
}  # fmt: skip


def check_flags(where: str, flags: Sequence[str]) -> None:
    """Raise ConfigError for a flag of sbatch that belongs to `malora launch slurm`; `where` it stands, in words."""
    for flag in flags:
        name = flag[2:].partition("=")[0] if flag.startswith("--") else flag[1:2] if flag.startswith("-") else ""
        if name in OWN_FLAGS:
            raise ConfigError(f"{flag}: not {where}; use {OWN_FLAGS[name]}")
