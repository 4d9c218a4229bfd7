"""Variables of a process: its rank inside a Slurm step, which names tasks otherwise than torch, and its allocator."""

import subprocess
from collections.abc import Mapping

from malora_dist.errors import TopologyError

FIRST_PORT, PORTS = 20000, 12000
ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLDER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def allocator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return PYTORCH_ALLOC_CONF for processes with a GPU; nothing if it, or the older PYTORCH_CUDA_ALLOC_CONF, is set.

    Every micro-batch has another number of tokens. With segments that grow, memory freed in one size serves the next.
    """
    if ALLOCATOR in environment or OLDER_ALLOCATOR in environment:
        return {}
    return {ALLOCATOR: "expandable_segments:True"}


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task that `srun` started beside others.

    Empty if a launcher has set them, outside a step, and for a single task: the batch script is no step. Values that
    are set are kept. Raises TopologyError if the first node's name cannot be found out.
    """
    if "RANK" in environment or environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
        # Two steps on one node must not meet.
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(FIRST_PORT + (7 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % PORTS),
    }
    return variables


def first_node(node_list: str) -> str:
    """The first host of a Slurm list such as `node[1-4,7]`. Raises TopologyError if Slurm does not tell."""
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise TopologyError(
            f"SLURM_STEP_NODELIST={node_list}: `scontrol show hostnames` does not name the nodes ({error}); "
            "set MASTER_ADDR to the first one's address"
        ) from error
