"""A real Slurm of two nodes for the tests of this folder."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import ROOT, SCRIPTS

SCRIPT = Path(__file__).with_name("cluster.sh")


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its commands are run from the controller's host."""

    state: Path

    def command(self, *words: str | Path, host: str = "ctl") -> list[str]:
        """A command line of that host: `srun`, `sbatch`, `scancel`, or a program on a node."""
        return [str(word) for word in (SCRIPT, "on", host, self.state, *words)]

    def environment(self) -> dict[str, str]:
        """Slurm hands it on to jobs: programs of this environment, one thread a process."""
        path = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str | Path, folder: Path, timeout: float = 60) -> str:
        """What a command prints. Raises AssertionError, with that, if it fails."""
        command = self.command("timeout", str(timeout), *words)
        done = subprocess.run(
            command, cwd=folder, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{command} exits {done.returncode}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # A munge socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        arguments: Sequence[str | Path] = [SCRIPT, "start", folder]
        started = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
        try:
            assert started.returncode == 0, started.stdout
            yield Cluster(Path(folder))
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True, timeout=60)
