"""Which of a run's processes this one is, by what torchrun, deepspeed or srun have put into its environment.

Variables of other jobs lie around: a pod exports WORLD_SIZE for its nodes, and a batch script inherits SLURM_NTASKS.
Only what a launcher sets as a whole, or a step of srun with several tasks, makes a process one of several.
"""

import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from random import Random

from malora_dist.errors import ConfigError, TopologyError

FIRST_PORT, PORTS = 20000, 12000
# What torch needs to know; launchers set all of it.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Of mpirun and its like, which tell torch nothing.
OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a process that was started beside others.

    Empty for a process of its own. Raises TopologyError if the environment says that there are others, and not who is
    who.
    """
    if _is_complete(environment):
        return {name: environment[name] for name in LAUNCHED}
    if not _in_step(environment):
        _refuse_half_a_launcher(environment)
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(_of_step(environment, "SLURM_STEP_NODELIST")),
        "MASTER_PORT": environment.get("MASTER_PORT") or _port_of_step(environment),
    }


def _port_of_step(environment: Mapping[str, str]) -> str:
    """Two steps on one node must not meet. Raises TopologyError if Slurm has not told the job's number."""
    job = _of_step(environment, "SLURM_JOB_ID")
    if not job.isdecimal():
        raise TopologyError(f"SLURM_JOB_ID={job} must be a number; set MASTER_PORT, the same for all tasks")
    return str(FIRST_PORT + (7 * int(job) + int(environment["SLURM_STEP_ID"])) % PORTS)


def _of_step(environment: Mapping[str, str], name: str) -> str:
    """What srun tells each task. Raises TopologyError if it is missing."""
    if not environment.get(name):
        raise TopologyError(
            f"{name} is not set, though SLURM_STEP_ID={environment['SLURM_STEP_ID']} says that srun has started this "
            "task: start with srun, which sets both, or set MASTER_ADDR and MASTER_PORT"
        )
    return environment[name]


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Whether this process is one that a launcher has started. Raises TopologyError as `rank_variables`."""
    if _is_complete(environment) or _in_step(environment):
        return True
    _refuse_half_a_launcher(environment)
    return False


def check_processes(environment: Mapping[str, str], num_gpus: int | None, master_port: int | None = None) -> None:
    """Raise ConfigError if a launched process is told to start another number of processes, or to meet elsewhere."""
    rank, size = place_of(environment)
    if master_port is not None and environment.get("MASTER_PORT") != str(master_port):
        raise ConfigError(
            f"--master_port {master_port}: a launcher has started this process, as number {rank} of {size} from 0, and "
            f"its processes meet at MASTER_PORT={environment.get('MASTER_PORT', '')}. Leave --master_port out here, "
            "and tell the launcher"
        )
    # torchrun's and deepspeed's number of processes on this machine.
    here = [environment.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if _is_complete(environment)]
    if num_gpus is not None and str(num_gpus) not in (str(size), *here):
        raise ConfigError(
            f"--num_gpus {num_gpus}: a launcher has started this process, as number {rank} of {size} from 0 "
            f"({_told_by(environment)}). Leave --num_gpus out here; or call malora without the launcher and its "
            "variables, and it starts the processes itself"
        )


def place_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of processes, (0, 1) for a process of its own and where `rank_variables` would raise."""
    with suppress(TopologyError):
        if _is_complete(environment):
            return int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if _in_step(environment):
            return int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def meeting_port(wanted: int | None) -> int:
    """The port of this machine at which a run's processes meet, by default a free one.

    Raises ConfigError if the wanted one cannot be had.
    """
    if wanted is None:
        return free_port()
    refusal = _refusal(wanted)
    if refusal is not None:
        raise ConfigError(f"--master_port {wanted}: {refusal}; leave it out, and a free port is taken")
    return wanted


def free_port() -> int:
    """A port of this machine that nobody has now, and that the system gives to no outgoing connection by itself."""
    ports = Random().sample(range(FIRST_PORT, FIRST_PORT + PORTS), PORTS)
    return next(port for port in ports if _refusal(port) is None)


def _refusal(port: int) -> str | None:
    """Why no process of this machine could listen at the port; None if one could."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            return error.strerror
    return None


def first_node(node_list: str) -> str:
    """The first host of a Slurm list such as `node[1-4,7]`. Raises TopologyError if Slurm does not tell."""
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise TopologyError(
            f"SLURM_STEP_NODELIST={node_list}: `scontrol show hostnames` does not name the nodes ({error}); "
            "set MASTER_ADDR to the first one's address"
        ) from error


def _is_complete(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has said everything. Raises TopologyError if that cannot be."""
    if not all(environment.get(name) for name in LAUNCHED):
        return False
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    numbers = all(environment[name].isdecimal() for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    if not numbers or not int(rank) < int(size):
        listed = ", ".join(f"{name}={environment[name]}" for name in LAUNCHED)
        raise TopologyError(f"{listed}: RANK must be a number from 0 to WORLD_SIZE less 1, the others numbers too")
    if _in_step(environment) and int(size) < int(environment["SLURM_STEP_NUM_TASKS"]):
        # A launcher in each task has at least as many processes in all as there are tasks.
        raise TopologyError(
            f"RANK={rank} and WORLD_SIZE={size} are set, and srun has started this process as task "
            f"{environment['SLURM_PROCID']} of SLURM_STEP_NUM_TASKS={environment['SLURM_STEP_NUM_TASKS']}: each would "
            f"train alone. Where the former are left of something else, unset {', '.join(LAUNCHED)}; else start with "
            "one of the two"
        )
    return True


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process beside others; a batch script, or a single task, is no such step."""
    if not all(environment.get(name, "").isdecimal() for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")):
        return False
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return tasks.isdecimal() and int(environment["SLURM_PROCID"]) < int(tasks) > 1


def _told_by(environment: Mapping[str, str]) -> str:
    names = LAUNCHED[:2] if _is_complete(environment) else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return ", ".join(f"{name}={environment[name]}" for name in names)


def _refuse_half_a_launcher(environment: Mapping[str, str]) -> None:
    """Raise TopologyError if there seem to be other processes of this run, each of which would train alone."""
    missing = ", ".join(name for name in LAUNCHED if not environment.get(name))
    if environment.get("RANK") and environment.get("WORLD_SIZE", "") not in ("", "0", "1"):
        raise TopologyError(
            f"RANK={environment['RANK']} and WORLD_SIZE={environment['WORLD_SIZE']} are set and {missing} "
            f"{'are' if ',' in missing else 'is'} not: torchrun, deepspeed and srun set all of them. Start with one of "
            "those (malora launch torchrun), set the rest too (LOCAL_RANK is 0 where each machine has one process), "
            "or unset RANK and WORLD_SIZE"
        )
    for name in OTHERS:
        if environment.get(name, "1") not in ("", "0", "1"):
            raise TopologyError(
                f"{name}={environment[name]}: mpirun has started this process beside others, and does not set "
                f"{missing}; start with torchrun, deepspeed or srun, or set them"
            )
