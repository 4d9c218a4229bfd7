"""Tests and all that they start see no GPU, whatever is visible outside.

What the environment says must be hidden before pytest starts, so all of it is looked at by a second pytest, started by
`test_all_where_gpus_are_visible` in an environment that names some.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.devices import HIDDEN
from tests.e2e import ROOT, deepspeed, launch
from tests.multiprocess import run_distributed
from tests.slurm.conftest import Cluster

INSIDE = "MALORA_TEST_HIDDEN"
NOTHING = {"variables": HIDDEN, "available": False, "device": "cpu"}
inside = pytest.mark.skipif(INSIDE not in os.environ, reason="test_all_where_gpus_are_visible runs it")


@pytest.mark.e2e
@pytest.mark.skipif(INSIDE in os.environ, reason="it has been started by this one")
def test_all_where_gpus_are_visible() -> None:
    outer = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    outer |= {"CUDA_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "0", INSIDE: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "slow_seconds=0", __file__]
    done = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed, 1 skipped" in done.stdout, done.stdout + done.stderr


@inside
def test_this_process() -> None:
    assert HIDDEN.items() <= os.environ.items() and not torch.cuda.is_available()


@inside
@pytest.mark.distributed
def test_ranks_of_run_distributed() -> None:
    assert run_distributed("tests.gpu.sees:see", 1) == [NOTHING]


@inside
@pytest.mark.e2e
def test_commands_and_the_processes_of_the_deepspeed_launcher(tmp_path: Path) -> None:
    """The launcher names device 0 to its process; joining the run hides it again."""
    done = launch(deepspeed(1, "tests.gpu.sees"), tmp_path)
    said = re.search(r"sees (.*)", done.output)
    assert "Setting CUDA_VISIBLE_DEVICES=0" in done.output, "the launcher no longer names devices"
    assert said is not None and json.loads(said[1]) == NOTHING, done.output


@inside
@pytest.mark.distributed
def test_the_process_that_ranks_are_forked_from() -> None:
    """It imports before a rank has an environment of its own."""
    assert run_distributed("tests.gpu.sees:see_at_start", 1) == [HIDDEN]


@inside
@pytest.mark.e2e
def test_jobs_of_slurm(tmp_path: Path) -> None:
    assert HIDDEN.items() <= Cluster(tmp_path).environment().items()
