"""Schedulers: what starts the processes of a run, and what it knows of them, of their job and of its queue.

`launch.schedulers` lists them. What a scheduler does not know it leaves as it is here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from malora_dist.errors import TopologyError
from malora_dist.launch.launcher import Launcher

# States of jobs, in Slurm's words. A scheduler with other words translates them.
UNKNOWN, PENDING, RUNNING, COMPLETED, FAILED = "UNKNOWN", "PENDING", "RUNNING", "COMPLETED", "FAILED"
ENDED = {
    COMPLETED, FAILED, "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A process that the scheduler's own launcher started beside others; `told` are the variables that say so."""

    rank: int
    size: int
    local_rank: int
    told: Mapping[str, str]


@dataclass(frozen=True)
class RunningJob:
    """The job that a process belongs to.

    id: names it over all its starts. nodes: how the scheduler lists them. gpus_per_node: 0 if it does not count them;
    `gpus_variable` is where it says so.
    """

    id: str
    nodes: str
    num_nodes: int = 0
    gpus_per_node: int = 0
    gpus_variable: str = ""


@dataclass(frozen=True)
class JobState:
    """The state of a submitted job, UNKNOWN if the scheduler gives none; why, in words, possibly none.

    forgotten: the scheduler answers, and has no such job: it ended some time ago.
    """

    state: str
    reason: str = ""
    forgotten: bool = False

    @property
    def ended(self) -> bool:
        """Whether it does not run and is not going to."""
        return self.state in ENDED or self.forgotten

    def __str__(self) -> str:
        state = self.state.lower().replace("_", " ")
        return f"{state} ({self.reason})" if self.reason else state


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a job asks its scheduler for, and how its processes start.

    save_before: seconds before the time limit at which a run is told to save. gpus_per_node: 0 asks for none; then, or
    to have fewer, `processes` is the number of processes on each node. start: "launcher" is one torchrun on each node,
    "tasks" a task of the scheduler for each process. sbatch, srun: the recipe's flags for them. arguments: of the
    command, None for those that the script is called with.
    """

    name: str = "malora"
    nodes: int = 2
    gpus_per_node: int = 8
    gpu_type: str | None = None
    processes: int | None = None
    cpus_per_task: int | None = 64
    time: str = "24:00:00"
    save_before: int = 300
    start: Literal["launcher", "tasks"] = "launcher"
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    arguments: tuple[str, ...] | None = None

    @property
    def processes_per_node(self) -> int:
        """The number of processes of each node."""
        return self.processes or self.gpus_per_node or 1


@dataclass(frozen=True)
class ArrayTasks:
    """The tasks of an array: their numbers, such as `1-3,7`; with one recipe, the folder above those of their runs."""

    numbers: str
    output_dir: str | None = None


class JobQueue(ABC):
    """Where jobs are submitted, asked about and cancelled."""

    script_suffix: ClassVar[str] = ".sh"

    @abstractmethod
    def check(self, options: JobOptions, flags: Sequence[str]) -> None:
        """Raise ConfigError for options, or more `flags` of the submission, that are impossible."""

    @abstractmethod
    def script(self, stage: str, options: JobOptions, folder: Path, array: ArrayTasks | None = None) -> str:
        """Return the script of a job of a run that trains, evaluates or converts, with its logs in `folder`.

        It calls `malora launch begin` before the processes of a training, and `malora launch end` after them: if that
        exits with 75, the script itself asks the scheduler to start the job again, since the scheduler answers by
        ending the job's processes, and only the script, which traps signals, can wait for that.
        """

    @abstractmethod
    def log(self, stage: str, job: str, folder: Path, *, array: bool) -> Path:
        """Return the file that takes the output of a submitted job; `%a` stands for the number of an array's task."""

    @abstractmethod
    def submit_command(self, flags: Sequence[str], after: str | None = None) -> list[str]:
        """Return the words that submit a script from standard input, to start once the job `after` has succeeded."""

    @abstractmethod
    def submit(
        self, script: str, flags: Sequence[str], environment: Mapping[str, str], after: str | None = None
    ) -> str:
        """Submit a script; return the job's id. Raises ConfigError with the scheduler's message if it refuses."""

    @abstractmethod
    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """Return the states of jobs, and of tasks of arrays (`123_4`), by their ids. Never raises."""

    @abstractmethod
    def cancel(self, job: str, environment: Mapping[str, str]) -> None:
        """End a job, if it is still there. Raises ConfigError if the scheduler does not answer."""

    @abstractmethod
    def cancel_command(self, job: str) -> str:
        """Return the command with which the user ends a job."""


class Scheduler:
    """One way in which the processes of a run are started, by what it puts into their environment."""

    name: ClassVar[str]
    # What it starts processes with at once, and where it keeps jobs; None for what it does not do.
    launcher: Launcher | None = None
    queue: JobQueue | None = None

    def task(self, environment: Mapping[str, str]) -> Task | None:
        """Return this process's place if the scheduler sets it in variables of its own, instead of torch's."""
        return None

    def meeting_place(self, environment: Mapping[str, str]) -> tuple[str, str]:
        """Return MASTER_ADDR and MASTER_PORT of a task; what is set already stays. Raises TopologyError if unknown."""
        raise TopologyError(f"{self.name} does not say where its processes meet: set MASTER_ADDR and MASTER_PORT")

    def num_nodes(self, environment: Mapping[str, str]) -> int | None:
        """Return the number of nodes of the processes; None if it does not say."""
        return None

    def local_size(self, environment: Mapping[str, str]) -> int | None:
        """Return the number of processes on this node; None if it does not say."""
        return None

    def hides_other_devices(self, environment: Mapping[str, str]) -> bool:
        """Return whether each process may see the one GPU that is its own, as number 0."""
        return False

    def job(self, environment: Mapping[str, str]) -> RunningJob | None:
        """Return the job that this process belongs to; None outside of one."""
        return None

    def is_requeued(self, environment: Mapping[str, str]) -> bool:
        """Return whether this job has been started again."""
        return False

    def end_time(self, environment: Mapping[str, str]) -> float | None:
        """Return when the job ends, as a `time.time()`; None outside of one, or if it has no limit."""
        return None
