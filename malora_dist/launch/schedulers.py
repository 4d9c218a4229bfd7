"""The schedulers by their names, and what those that started this process say. A new one is another entry here."""

from collections.abc import Mapping

from malora_dist.errors import ConfigError
from malora_dist.launch.launcher import Launcher
from malora_dist.launch.scheduler import JobQueue, RunningJob, Scheduler, Task
from malora_dist.launch.slurm.scheduler import Slurm
from malora_dist.launch.ssh.scheduler import DeepSpeed
from malora_dist.launch.torchrun import Torchrun

# Launchers first: they start processes inside of jobs.
SCHEDULERS: dict[str, Scheduler] = {one.name: one for one in (DeepSpeed(), Torchrun(), Slurm())}


def queues() -> dict[str, JobQueue]:
    """Return the queues of the schedulers that have one, by the schedulers' names."""
    return {name: one.queue for name, one in SCHEDULERS.items() if one.queue is not None}


def launcher_of(name: str) -> Launcher:
    """Return the launcher of a scheduler. Raises ConfigError if it starts nothing at once."""
    found = SCHEDULERS[name].launcher if name in SCHEDULERS else None
    if found is None:
        known = [other for other, one in SCHEDULERS.items() if one.launcher is not None]
        raise ConfigError(f"{name} starts no processes: those that do are {', '.join(known)}")
    return found


def task_of(environment: Mapping[str, str]) -> tuple[Scheduler, Task] | None:
    """Return the scheduler that started this process as a task beside others, and the task."""
    found = ((one, one.task(environment)) for one in SCHEDULERS.values())
    return next(((one, task) for one, task in found if task is not None), None)


def num_nodes(environment: Mapping[str, str]) -> int:
    """Return the number of nodes of this process's run from the first scheduler that knows it; else 1."""
    counts = (one.num_nodes(environment) for one in SCHEDULERS.values())
    return next((count for count in counts if count is not None), 1)


def local_sizes(environment: Mapping[str, str]) -> list[int]:
    """Return the numbers of processes on this node that launchers report."""
    sizes = (one.local_size(environment) for one in SCHEDULERS.values())
    return [size for size in sizes if size is not None]


def hides_other_devices(environment: Mapping[str, str]) -> bool:
    """Return whether a process with one visible GPU may have it for itself."""
    return any(one.hides_other_devices(environment) for one in SCHEDULERS.values())


def job_of(environment: Mapping[str, str]) -> RunningJob:
    """Return the job whose script runs here. Raises ConfigError outside of one."""
    job = next((job for one in SCHEDULERS.values() if (job := one.job(environment)) is not None), None)
    if job is None:
        raise ConfigError(f"no job of {' or '.join(queues())} runs here: this is for job scripts; use malora train")
    return job


def is_requeued(environment: Mapping[str, str]) -> bool:
    """Return whether the job of this process has been started again by its scheduler."""
    return any(one.is_requeued(environment) for one in SCHEDULERS.values())


def end_time(environment: Mapping[str, str]) -> float | None:
    """Return when the job of this process ends, as a `time.time()`; None without a limit."""
    ends = [end for one in SCHEDULERS.values() if (end := one.end_time(environment)) is not None]
    return min(ends, default=None)
