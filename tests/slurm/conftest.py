"""A real Slurm of two nodes for the tests of this folder; cluster.sh says what it consists of.

Without it they fail. MALORA_SKIP_SLURM=1 skips what cannot run here: without Slurm, which only root can install, all of
them; where the nodes have no namespaces of their own, those that need some.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import ROOT, SCRIPTS

SCRIPT = Path(__file__).with_name("cluster.sh")
SKIP = "MALORA_SKIP_SLURM"


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its commands are run from the controller's host."""

    state: Path

    @property
    def namespaces(self) -> bool:
        """Whether a node has a network, a host name and processes of its own, and ssh."""
        return not (self.state / "loopback").exists()

    @property
    def nodes(self) -> tuple[str, str]:
        """Their names, which resolve in jobs."""
        return ("node1", "node2") if self.namespaces else ("127.0.0.1", "127.0.0.2")

    def command(self, *words: str | Path, host: str = "ctl") -> list[str]:
        """A command line of that host: `srun`, `sbatch`, `scancel`, or a program on a node."""
        return [str(word) for word in (SCRIPT, "on", host, self.state, *words)]

    def environment(self) -> dict[str, str]:
        """Slurm hands it on to jobs: programs of this environment, one thread a process."""
        path = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str | Path, folder: Path, timeout: float = 200) -> str:
        """What a command prints. Raises AssertionError, with that, if it fails."""
        command = self.command("timeout", str(timeout), *words)
        done = subprocess.run(
            command, cwd=folder, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{command} exits {done.returncode}\n{done.stdout}"
        return done.stdout

    def submit(self, *words: str | Path, folder: Path) -> str:
        """The id of a job that a command submits: the first number in the last line it prints."""
        said = self.run(*words, folder=folder)
        found = re.search(r"\d+", said.strip().rpartition("\n")[2])
        assert found is not None, f"{words} names no job\n{said}"
        return found[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, by field. An array's task is 12_3; an array's id gives one of its tasks."""
        said = self.run("scontrol", "show", "job", "--oneliner", job_id, folder=self.state).splitlines()[0]
        return dict(field.partition("=")[::2] for field in re.split(r"\s+(?=[A-Z][\w:/]*=)", said.strip()))

    def node_state(self, node: str) -> str:
        """Such as idle, allocated, mixed, or down*, where * says that it does not answer."""
        words = ["sinfo", "--noheader", "--partition=all", "--Node", f"--nodes={node}", "--format=%T"]
        return self.run(*words, folder=self.state).strip()

    def lose(self, node: str) -> None:
        """The machine is gone, with all that runs on it."""
        self._do("lose", node)

    def kill_daemon(self, node: str) -> None:
        """Slurm's daemon there is gone; what it has started lives on."""
        self._do("kill-daemon", node)

    def cut(self, node: str) -> None:
        """Pull its network cable."""
        self._do("cut", node)

    def mend(self, node: str) -> None:
        """Put the cable back."""
        self._do("mend", node)

    def revive(self, node: str) -> None:
        """Mend all of that; the node is idle then."""
        self._do("revive", node)

    def _do(self, verb: str, node: str) -> None:
        _script(verb, node, self.state, timeout=200)


def _script(*words: str | Path, timeout: float) -> None:
    # To a file: daemons that inherit a pipe would keep it open.
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run([SCRIPT, *words], stdout=said, stderr=subprocess.STDOUT, timeout=timeout)
        said.seek(0)
        assert done.returncode == 0, f"cluster.sh {words[0]}: {said.read()}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """In any mode; without root its nodes are two daemons on one host."""
    # A munge socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        try:
            _start(Path(folder))
            yield Cluster(Path(folder))
        finally:
            _script("stop", folder, timeout=60)


def _start(folder: Path) -> None:
    try:
        _script("start", folder, timeout=400)
    except AssertionError as error:
        _cannot(str(error))


def _cannot(why: str) -> None:
    if os.environ.get(SKIP) == "1":
        pytest.skip(f"{SKIP}=1: {why}")
    pytest.fail(f"{why}\n{SKIP}=1 skips what cannot run here", pytrace=False)


@pytest.fixture
def namespaces(cluster: Cluster) -> Cluster:
    """The cluster, for a test of nodes that can be lost, have two addresses, or are reached by ssh."""
    if not cluster.namespaces:
        _cannot("needs nodes with namespaces of their own, that is, root")
    return cluster


@pytest.fixture
def mended(namespaces: Cluster) -> Iterator[Cluster]:
    """The cluster, for a test that breaks it; what it leaves broken is mended for the next one."""
    yield namespaces
    for node in namespaces.nodes:
        if namespaces.node_state(node) not in ("idle", "allocated", "mixed", "completing"):
            namespaces.revive(node)
