"""The checks of a GPU machine, tried without one: their stages run on the CPU, on tiny sizes."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.devices import HIDDEN
from tests.e2e import ROOT

pytestmark = pytest.mark.e2e


def check(folder: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    """check.sh with all that it writes in `folder`; nothing is installed."""
    (folder / "site").mkdir()
    (folder / "site" / ".done").touch()
    places = {"SITE": "site", "OUT": "out", "LOGS": "logs", "PARTS": "parts", "MALORA_CACHE": "cache"}
    limits = {"LIMIT": "280", "STAGE_LIMIT": "270", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment = {**os.environ, **HIDDEN, **limits, **{name: str(folder / place) for name, place in places.items()}}
    command = ["bash", "benchmarks/gpu/check.sh", *stages]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290)


def test_stages_run_and_their_logs_come_back(tmp_path: Path) -> None:
    done = check(tmp_path, "layer", "nf4", "none")
    assert "== layer: PASS" in done.stdout and "== nf4: PASS" in done.stdout, done.stdout + done.stderr
    assert "| ok   dropout masks equal to the CPU's to the bit" in done.stdout and "BAD" not in done.stdout
    assert done.returncode == 1 and done.stdout.endswith("layer PASS\nnf4 PASS\nnone unknown\n")
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert {"./layer.log", "./nf4.log"} <= set(logs.getnames())
