"""What torch is told inside a Slurm step. tests/slurm runs the real srun."""

import os
from pathlib import Path

import pytest

from malora_dist.errors import TopologyError
from malora_dist.launch.environment import allocator_variables, rank_variables

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return script


@pytest.mark.e2e
def test_a_task_among_others(scontrol: Path) -> None:
    assert rank_variables(STEP) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "20121",
    }  # fmt: skip
    given = rank_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "5")


def test_nothing_where_somebody_else_has_said_it() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "17"}
    for environment in ({}, batch, {**STEP, "RANK": "0"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}):
        assert rank_variables(environment) == {}


def test_the_allocators_segments_grow_unless_the_user_has_said_otherwise() -> None:
    assert allocator_variables({"PYTORCH_OTHER": "1"}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator_variables({name: "max_split_size_mb:128"}) == allocator_variables({name: ""}) == {}


@pytest.mark.e2e
def test_a_step_whose_nodes_slurm_does_not_name(scontrol: Path) -> None:
    with pytest.raises(TopologyError, match=r"SLURM_STEP_NODELIST=node\[8\].*set MASTER_ADDR"):
        rank_variables({**STEP, "SLURM_STEP_NODELIST": "node[8]"})
