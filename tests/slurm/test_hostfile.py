"""`malora launch deepspeed` from one host, over ssh and pdsh, on both nodes; no Slurm takes part."""

import json
import subprocess
from pathlib import Path

import pytest

from malora_dist.tracking.metrics import read_metrics
from tests.e2e import make_folder
from tests.slurm.conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow("new interpreters on two nodes, by ssh")]

BAD_HOSTS = ("no-such-host", "ctl", "10.77.0.9")
SHORT = ["--train.max_steps", "3", "--evaluation.base", "false", "--evaluation.tuned", "false"]


def malora(namespaces: Cluster, *words: str, folder: Path, timeout: float = 100) -> tuple[int, str]:
    """Exit code and output of a command from the controller's host."""
    script = 'code=0; "$@" 2>&1 || code=$?; echo "exit $code"'
    said = namespaces.run("bash", "-c", script, "bash", "malora", "launch", *words, folder=folder, timeout=timeout)
    output, _, code = said.strip().rpartition("exit ")
    return int(code), output


def test_a_run_on_the_hosts_of_a_hostfile(namespaces: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    recipe = make_folder(folder) / "recipe.yaml"
    recipe = recipe.rename(folder / 'it\'s a "recipe" $HOME %n.yaml')
    (folder / "hosts").write_text("# two nodes\nnode1 slots=1\nnode2 slots=2\n")
    output_dir = "runs/a b"
    options = ["--hostfile", "hosts", "--include", "node1@node2:1", "--output_dir", output_dir]
    code, said = malora(namespaces, "deepspeed", recipe.name, *options, *SHORT, folder=folder, timeout=200)
    assert code == 0, said
    run = folder / output_dir
    assert json.loads((run / "exit.json").read_text())["outcome"] == "finished", said
    records = read_metrics(run / "metrics.jsonl")
    assert [record["world_size"] for record in records if record["kind"] == "run"] == [2]
    assert [record["step"] for record in records if record["kind"] == "train"][-1] == 3
    # Each host started one process, and says so through the one command.
    assert all(f"{node}: " in said for node in ("node1", "node2"))


def test_hosts_that_cannot_take_part_are_all_named_before_anything_starts(namespaces: Cluster, tmp_path: Path) -> None:
    """One without a name, two where nobody listens, one without the folder; the one that can is not named."""
    folder = make_folder(tmp_path / "here")
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in ("node1", *BAD_HOSTS, "node2")))
    subprocess.run(namespaces.command("mount", "-t", "tmpfs", "none", tmp_path, host="node2"), check=True, timeout=30)
    try:
        batch = ["--train.global_batch_size", "10"]
        code, said = malora(namespaces, "deepspeed", "recipe.yaml", "--hostfile", "hosts", *batch, folder=folder)
    finally:
        subprocess.run(namespaces.command("umount", tmp_path, host="node2"), check=True, timeout=30)
    assert code == 2
    assert "nothing was started" in said and "$ " not in said and not (folder / "runs").exists()
    assert "no-such-host: ssh: Could not resolve hostname" in said
    assert "ctl: ssh: connect to host ctl port 22: Connection refused" in said
    assert "10.77.0.9: ssh: connect to host 10.77.0.9 port 22: " in said
    assert f"cd: {folder}: No such file or directory" in said and "node1: " not in said
