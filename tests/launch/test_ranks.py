"""Which process of a run this one is told to be. tests/slurm runs the real srun."""

import os
from pathlib import Path

import pytest

from malora_dist.errors import ConfigError, TopologyError
from malora_dist.launch.ranks import (
    check_processes,
    place_of,
    rank_variables,
    under_launcher,
)

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "7"}
STEP = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
}
BATCH = {
    "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NPROCS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1",
}  # fmt: skip
POD = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456"}
ALONE = [
    {},
    {"RANK": "0"},
    {"RANK": "3"},
    {"LOCAL_RANK": "1"},
    {"WORLD_SIZE": "1"},
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "7", "LOCAL_RANK": "0"},
    POD,
    BATCH,
    {**BATCH, "WORLD_SIZE": "2", "MASTER_PORT": "12000"},
    {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return script


@pytest.mark.parametrize("environment", ALONE)
def test_what_is_left_of_other_jobs_is_no_launcher(environment: dict[str, str]) -> None:
    assert not under_launcher(environment)
    assert rank_variables(environment) == {} and place_of(environment) == (0, 1)


def test_a_launchers_process_is_what_the_launcher_says() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "0", "PMI_SIZE": "1"}
    node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    # What counts the processes of a node in each task numbers them as it likes.
    inside = [{**LAUNCHED, **STEP, "LOCAL_WORLD_SIZE": "1"}, {**LAUNCHED, **STEP, "LOCAL_SIZE": "1"}]
    tasks = [{**LAUNCHED, **STEP, "SLURM_PROCID": "1"}, {**LAUNCHED, **STEP, **node}, {**LAUNCHED, **mpi}]
    for environment in (LAUNCHED, {**LAUNCHED, **BATCH}, *inside, *tasks):
        assert under_launcher(environment)
        assert rank_variables(environment) == LAUNCHED and place_of(environment) == (1, 4)
    assert under_launcher({**LAUNCHED, "RANK": "0", "WORLD_SIZE": "1"})


@pytest.mark.e2e
def test_a_task_among_others(scontrol: Path) -> None:
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "20121"}
    # What the batch script has exported for all tasks says nothing of one of them.
    for environment in (STEP, {**STEP, "WORLD_SIZE": "2", "RANK": "0"}):
        assert under_launcher(environment) and place_of(environment) == (3, 4)
        assert rank_variables(environment) == wanted
    given = rank_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "5")


@pytest.mark.e2e
def test_a_step_whose_nodes_slurm_does_not_name(scontrol: Path) -> None:
    with pytest.raises(TopologyError, match=r"SLURM_STEP_NODELIST=node\[8\].*set MASTER_ADDR"):
        rank_variables({**STEP, "SLURM_STEP_NODELIST": "node[8]"})


@pytest.mark.parametrize("name", ["SLURM_STEP_NODELIST", "SLURM_JOB_ID"])
def test_a_step_of_which_slurm_does_not_tell_all(name: str) -> None:
    environment = {**STEP, "MASTER_PORT" if name == "SLURM_STEP_NODELIST" else "MASTER_ADDR": "7"}
    del environment[name]
    with pytest.raises(TopologyError, match=f"{name} is not set, though SLURM_STEP_ID=2 says that srun"):
        rank_variables(environment)
    with pytest.raises(TopologyError, match="SLURM_JOB_ID=x must be a number; set MASTER_PORT"):
        rank_variables({**STEP, "SLURM_JOB_ID": "x", "MASTER_ADDR": "n0"})
    assert rank_variables({**environment, "MASTER_ADDR": "n0", "MASTER_PORT": "7"})["MASTER_PORT"] == "7"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not: torchrun"),
        ({**LAUNCHED, "LOCAL_RANK": ""}, "RANK=1 and WORLD_SIZE=4 are set and LOCAL_RANK is not"),
        ({**LAUNCHED, "RANK": "4"}, "RANK must be a number from 0 to WORLD_SIZE less 1"),
        ({**LAUNCHED, "RANK": "main"}, "RANK=main.*RANK must be a number"),
        ({**LAUNCHED, "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({**LAUNCHED, "MASTER_PORT": "tcp"}, "MASTER_PORT=tcp"),
        ({**LAUNCHED, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: .* MASTER_PORT at most 65535"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: mpirun has started this process beside others"),
        (
            {**LAUNCHED, "RANK": "0", "WORLD_SIZE": "1", **STEP},
            "RANK=0 and WORLD_SIZE=1 are set, and slurm .* task 3 of 4 .SLURM_PROCID=3, .* unset RANK, WORLD_SIZE",
        ),
        ({**LAUNCHED, "WORLD_SIZE": "2", **STEP}, "WORLD_SIZE=2 are set, and slurm .* each would train alone"),
        # Exported once for all tasks.
        ({**LAUNCHED, "RANK": "0", **STEP}, "RANK=0 and .* slurm .* task 3 of 4 .* all would be the same one"),
        (
            {**LAUNCHED, "RANK": "0", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"},
            "RANK=0 and .* mpirun .* task 2 of 4 .OMPI_COMM_WORLD_RANK=2, .*SIZE=4.: all would be the same one",
        ),
        (
            {**LAUNCHED, "RANK": "0", "WORLD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "4"},
            "mpirun .* task 1 of 4 .* each would train alone",
        ),
    ],
)
def test_processes_that_would_each_train_alone_are_refused(environment: dict[str, str], message: str) -> None:
    for look in (under_launcher, rank_variables):
        with pytest.raises(TopologyError, match=message):
            look(environment)
    assert place_of(environment) == (0, 1)


def test_a_number_of_processes_at_odds_with_the_launchers_is_refused() -> None:
    for environment in (LAUNCHED, STEP):
        check_processes(environment, None)
        check_processes(environment, 4)
    check_processes({**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}, 2)
    check_processes({**LAUNCHED, "LOCAL_SIZE": "2"}, 2)
    with pytest.raises(ConfigError, match=r"--num_gpus 2: .* number 1 of 4 from 0 \(RANK=1, WORLD_SIZE=4\)"):
        check_processes(LAUNCHED, 2)
    with pytest.raises(ConfigError, match=r"--num_gpus 1: .* \(SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=4\)"):
        check_processes(STEP, 1)


def test_a_port_at_odds_with_the_launchers_is_refused() -> None:
    check_processes(LAUNCHED, None, 7)
    with pytest.raises(ConfigError, match=r"--master_port 12345: .* number 1 of 4 from 0, .* meet at MASTER_PORT=7"):
        check_processes(LAUNCHED, None, 12345)
    with pytest.raises(ConfigError, match="--master_port 12345: "):
        check_processes(STEP, None, 12345)
