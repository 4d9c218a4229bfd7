"""Which of a run's processes this one is, by what torchrun, deepspeed or srun have put into its environment.

Variables of other jobs are left over in many environments: a pod exports WORLD_SIZE for its nodes, and a batch script
inherits the number of tasks of its whole job. Only the variables that a launcher sets as a whole, or a scheduler that
names this process as one of several tasks, make it one of several.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from malora_dist.errors import ConfigError, TopologyError
from malora_dist.launch.schedulers import local_sizes, task_of

# What torch needs; launchers set all of them.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HIGHEST_PORT = 65_535
# Set by mpirun and the like, which do not set what torch needs: rank and number of processes.
OTHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a process that was started beside others.

    Empty for a process of its own. Raises TopologyError if the environment says that there are others, and not which
    rank each is.
    """
    if _is_complete(environment):
        return {name: environment[name] for name in LAUNCHED}
    found = task_of(environment)
    if found is None:
        _refuse_half_a_launcher(environment)
        return {}
    scheduler, task = found
    address, port = scheduler.meeting_place(environment)
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.size),
        "LOCAL_RANK": str(task.local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher has started this process. Raises TopologyError as `rank_variables`."""
    if _is_complete(environment) or task_of(environment) is not None:
        return True
    _refuse_half_a_launcher(environment)
    return False


def check_processes(environment: Mapping[str, str], num_gpus: int | None, master_port: int | None = None) -> None:
    """Raise ConfigError if a launched process is asked to start another number of processes, or to use another port."""
    rank, size = place_of(environment)
    if master_port is not None and environment.get("MASTER_PORT") != str(master_port):
        raise ConfigError(
            f"--master_port {master_port}: a launcher has started this process, as number {rank} of {size} from 0, and "
            f"its processes meet at MASTER_PORT={environment.get('MASTER_PORT', '')}. Omit --master_port here and set "
            "it for the launcher"
        )
    here = local_sizes(environment) if _is_complete(environment) else []
    if num_gpus is not None and num_gpus not in (size, *here):
        raise ConfigError(
            f"--num_gpus {num_gpus}: a launcher has started this process, as number {rank} of {size} from 0 "
            f"({_told_by(environment)}). Omit --num_gpus here; or call malora without the launcher and its variables, "
            "so that it starts the processes itself"
        )


def place_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return rank and number of processes; (0, 1) for a process of its own and where `rank_variables` would raise."""
    with suppress(TopologyError):
        if _is_complete(environment):
            return int(environment["RANK"]), int(environment["WORLD_SIZE"])
        found = task_of(environment)
        if found is not None:
            return found[1].rank, found[1].size
    return 0, 1


def _is_complete(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher has set all its variables. Raises TopologyError if their values cannot be right."""
    if not all(environment.get(name) for name in LAUNCHED):
        return False
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    numbers = all(environment[name].isdecimal() for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    if not numbers or not int(rank) < int(size) or int(environment["MASTER_PORT"]) > HIGHEST_PORT:
        raise TopologyError(
            f"{_listed(environment, LAUNCHED)}: RANK must be a number from 0 to WORLD_SIZE less 1, the others numbers "
            f"too, MASTER_PORT at most {HIGHEST_PORT}"
        )
    for starter, other_rank, other_size, told in _places_told(environment):
        # A launcher in each task has at least as many processes in all as there are tasks, and counts them as it likes.
        own = not local_sizes(environment) and other_rank != int(rank)
        if int(size) < other_size or (int(size) == other_size and own):
            raise TopologyError(
                f"RANK={rank} and WORLD_SIZE={size} are set, and {starter} has started this process as task "
                f"{other_rank} of {other_size} ({_listed(environment, told)}): "
                f"{'each would train alone' if int(size) < other_size else 'all would be the same one'}. If the former "
                f"are left over from something else, unset {', '.join(LAUNCHED)}; otherwise start with only one of the "
                "two"
            )
    return True


def _places_told(environment: Mapping[str, str]) -> Iterator[tuple[str, int, int, Iterable[str]]]:
    """Yield whatever else claims to have started this process beside others: name, rank, size and variables."""
    found = task_of(environment)
    if found is not None:
        scheduler, task = found
        yield scheduler.name, task.rank, task.size, task.told
    for names in OTHERS:
        rank, size = (environment.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size) > 1:
            yield "mpirun", int(rank), int(size), names


def _told_by(environment: Mapping[str, str]) -> str:
    if _is_complete(environment):
        return _listed(environment, LAUNCHED[:2])
    found = task_of(environment)
    return "" if found is None else _listed(found[1].told, found[1].told)


def _listed(environment: Mapping[str, str], names: Iterable[str]) -> str:
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
    for _, name in OTHERS:
        if environment.get(name, "1") not in ("", "0", "1"):
            raise TopologyError(
                f"{name}={environment[name]}: mpirun has started this process beside others, and does not set "
                f"{missing}; start with torchrun, deepspeed or srun, or set them"
            )
