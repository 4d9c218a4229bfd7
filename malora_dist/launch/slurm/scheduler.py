"""Slurm, as srun's tasks and job scripts find it in their environment.

A batch script inherits SLURM_NTASKS and the like for all of its job; only a step of several tasks starts processes.
"""

import subprocess
import time
from collections.abc import Mapping
from typing import ClassVar

from malora_dist.errors import TopologyError
from malora_dist.launch.ports import FIRST_PORT, PORTS
from malora_dist.launch.scheduler import RunningJob, Scheduler, Task
from malora_dist.launch.slurm.job_queue import SlurmQueue
from malora_dist.launch.slurm.time_limit import seconds_left


class Slurm(Scheduler):
    """A cluster's queue, and srun, which tells its tasks in variables of its own who they are."""

    name: ClassVar[str] = "slurm"
    queue = SlurmQueue()

    def task(self, environment: Mapping[str, str]) -> Task | None:
        """Return the place of a process that srun started beside others; a single task is no such process."""
        names = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")
        if not all(environment.get(name, "").isdecimal() for name in names):
            return None
        rank, size = environment["SLURM_PROCID"], environment.get("SLURM_STEP_NUM_TASKS", "1")
        if not size.isdecimal() or not int(rank) < int(size) > 1:
            return None
        told = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size}
        return Task(int(rank), int(size), int(environment["SLURM_LOCALID"]), told)

    def meeting_place(self, environment: Mapping[str, str]) -> tuple[str, str]:
        """Return the step's first node, and a port for each step. Raises TopologyError if Slurm does not name them."""
        address = environment.get("MASTER_ADDR") or first_node(_of_step(environment, "SLURM_STEP_NODELIST"))
        return address, environment.get("MASTER_PORT") or _port_of_step(environment)

    def num_nodes(self, environment: Mapping[str, str]) -> int | None:
        """Return the step's number of nodes, else the job's, which may have more than are used."""
        counts = (environment.get(name) for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"))
        count = next((count for count in counts if count), "")
        return int(count) if count.isdecimal() else None

    def hides_other_devices(self, environment: Mapping[str, str]) -> bool:
        """Return whether srun started this process: --gpus-per-task=1 shows each task its own device alone."""
        return "SLURM_STEP_ID" in environment

    def job(self, environment: Mapping[str, str]) -> RunningJob | None:
        """Return the job of a batch script or step."""
        if "SLURM_JOB_ID" not in environment:
            return None
        nodes, gpus = "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE"
        return RunningJob(
            id=environment["SLURM_JOB_ID"],
            nodes=environment.get("SLURM_JOB_NODELIST", "this node"),
            num_nodes=_number(environment, nodes),
            gpus_per_node=_number(environment, gpus),
            gpus_variable=gpus,
        )

    def is_requeued(self, environment: Mapping[str, str]) -> bool:
        """Return whether SLURM_RESTART_COUNT counts an earlier start."""
        return environment.get("SLURM_RESTART_COUNT", "0") != "0"

    def end_time(self, environment: Mapping[str, str]) -> float | None:
        """Return when the job ends; asks squeue where Slurm is too old to have set SLURM_JOB_END_TIME."""
        if "SLURM_JOB_ID" not in environment:
            return None
        if environment.get("SLURM_JOB_END_TIME", "").isdigit():
            return float(environment["SLURM_JOB_END_TIME"])
        command = ["squeue", "--noheader", "--jobs", environment["SLURM_JOB_ID"], "--format", "%L"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        left = seconds_left(done.stdout.strip().splitlines()[0] if done.stdout.strip() else "")
        return None if left is None else time.time() + left


def first_node(node_list: str) -> str:
    """Return the first host of a list such as `node[1-4,7]`. Raises TopologyError if Slurm does not name it."""
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise TopologyError(
            f"SLURM_STEP_NODELIST={node_list}: `scontrol show hostnames` does not name the nodes ({error}); "
            "set MASTER_ADDR to the first one's address"
        ) from error


def _port_of_step(environment: Mapping[str, str]) -> str:
    """Return a port by job and step, so that two steps on one node do not meet at the same one.

    Raises TopologyError if Slurm has not set the job's number.
    """
    job = _of_step(environment, "SLURM_JOB_ID")
    if not job.isdecimal():
        raise TopologyError(f"SLURM_JOB_ID={job} must be a number; set MASTER_PORT, the same for all tasks")
    return str(FIRST_PORT + (7 * int(job) + int(environment["SLURM_STEP_ID"])) % PORTS)


def _of_step(environment: Mapping[str, str], name: str) -> str:
    """Return a variable that srun sets for each task. Raises TopologyError if it is missing."""
    if not environment.get(name):
        raise TopologyError(
            f"{name} is not set, though SLURM_STEP_ID={environment['SLURM_STEP_ID']} says that srun has started this "
            "task: start with srun, which sets both, or set MASTER_ADDR and MASTER_PORT"
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    return int(environment[name]) if environment.get(name, "").isdigit() else 0
