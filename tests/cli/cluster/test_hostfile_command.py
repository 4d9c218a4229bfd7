import os
import re
from pathlib import Path

import pytest

from malora_dist.launch.ssh.pdsh import FAMILIES
from tests.cli.cluster.submitted import launch
from tests.commands import malora, malora_without_torch

HOSTS = "10.0.0.1 slots=2\n10.0.0.2 slots=2\n10.0.0.3 slots=4\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert malora("init", "r.yaml", "--model", "my/model") == 0
    (tmp_path / "hosts").write_text(HOSTS)
    return "r.yaml"


def script(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    for module in ("ssh.launcher", "torchrun"):
        monkeypatch.setattr(f"malora_dist.launch.{module}.launcher_path", lambda *_: str(path))
    return path


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (
            ["--hostfile", "hosts", "--exclude", "10.0.0.3"],
            "--hostfile hosts --exclude 10.0.0.3 --master_port PORT --force_multi --no_ssh_check --launcher pdsh",
        ),
        (
            ["--hostfile=hosts", "--include", "10.0.0.3:0,2", "--master_addr", "ib3", "--master-port", "7"],
            "--hostfile hosts --include 10.0.0.3:0,2 --master_addr ib3 --master_port 7 --force_multi --no_ssh_check "
            "--launcher pdsh",
        ),
        (["--num_gpus", "2"], "--num_gpus 2 --master_port PORT"),
        # The one host is this machine, where nobody may listen for ssh.
        (["--hostfile", "here"], "--num_gpus 4 --master_port PORT"),
        (["--hostfile", "here", "--include", "127.0.0.1:1,3"], "--include localhost:1,3 --master_port PORT"),
    ],
)
def test_a_dry_run_prints_the_command(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], command: str
) -> None:
    (tmp_path / "here").write_text("127.0.0.1 slots=4\n")
    assert launch("deepspeed", recipe, *options, "--dry-run", "--train.global_batch_size", "16", "--adapter.r=6") == 0
    words = " ".join(capsys.readouterr().out.split())
    # Two runs on one machine must not meet.
    assert "29500" not in words
    words = re.sub(r"--master_port \d{5}\b", "--master_port PORT", words)
    assert words.partition(" ")[2].endswith(
        f"deepspeed --log_level error {command} --module malora_dist.train r.yaml "
        "--train.global_batch_size 16 --adapter.r=6"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepspeed", "r.yaml", "--hostfile", "none"], "--hostfile=none cannot be read"),
        (["deepspeed", "r.yaml", "--hostfile", "hosts"], "10.0.0.3 has 4, not 2 as 10.0.0.1, 10.0.0.2"),
        (["deepspeed", "r.yaml", "--hostfile", "hosts", "--include", "h:0"], "'h' is not in the hostfile"),
        (["deepspeed", "r.yaml", "--hostfile", "hosts", "--num_gpus", "2"], "--num_gpus=2: with --hostfile"),
        (
            ["deepspeed", "r.yaml", "--hostfile", "hosts", "--launcher", "openmpi"],
            "--launcher=openmpi: only pdsh",
        ),
        (["deepspeed", "r.yaml", "--include", "10.0.0.1"], "choose from a --hostfile"),
        (["deepspeed", "r.yaml", "--num_gpus", "3"], "cannot be split"),
        (["deepspeed", "r.yaml", "--num_gpus", "2", "--adapter.rr", "3"], "adapter.rr"),
        (["deepspeed", "none.yaml", "--num_gpus", "2"], "cannot read the recipe none.yaml"),
        (["deepspeed", "--adapter.r", "3", "r.yaml"], "the recipe must come before its settings"),
        (["torchrun", "--adapter.r", "3", "r.yaml"], "the recipe must come before its settings"),
        (["torchrun", "r.yaml", "--nproc_per_node", "3"], "cannot be split"),
        (["torchrun", "r.yaml", "--nproc_per_node", "1", "--nnodes", "3"], "cannot be split"),
        (["torchrun", "r.yaml", "--nproc_per_node", "1", "--nnodes", "2"], "give this machine's number, from 0"),
    ],
)
def test_refusals_before_anything_starts(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert launch(*arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and captured.out == ""


def test_pdsh_is_missed_before_anything_starts(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert launch("deepspeed", recipe, "--hostfile", "hosts", "--exclude", "10.0.0.3") == 2
    assert "pdsh is not installed here" in capsys.readouterr().err


@pytest.mark.e2e
def test_hosts_are_asked_before_anything_starts(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts stand in for pdsh, which must not be called, and for an ssh that no host answers."""
    script(tmp_path, monkeypatch, "pdsh", "exit 9")
    script(tmp_path, monkeypatch, "ssh", "echo 'No route to host' >&2; exit 255")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launch("deepspeed", recipe, "--hostfile", "hosts", "--exclude", "10.0.0.3") == 2
    error = capsys.readouterr().err
    assert "10.0.0.1: No route to host" in error and "10.0.0.2: No route to host" in error


@pytest.mark.e2e
def test_the_launcher_runs_and_its_exit_code_is_ours(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A script stands in for the launcher, and for pdsh."""
    says = 'echo "started: $*"; cat "$DS_ENV_FILE"; echo "ssh: $PDSH_SSH_ARGS_APPEND"; exit 75'
    launcher = script(tmp_path, monkeypatch, "pdsh", says)
    for name in [name for name in os.environ if name.startswith(FAMILIES) and name != "DS_ACCELERATOR"]:
        # What libraries have set in this process, as an earlier test used them.
        monkeypatch.delenv(name)
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    options = ["--hostfile", "hosts", "--exclude", "10.0.0.3", "--no-ssh-check"]
    assert launch("deepspeed", recipe, *options, "--adapter.r", "6") == 75
    out, err = capfd.readouterr()
    assert out.startswith("started: --log_level error --hostfile hosts --exclude 10.0.0.3 ")
    assert "\nOMP_NUM_THREADS=3\nPATH=" in out
    assert "\nssh: -p 2222 -o BatchMode=yes -o ServerAliveInterval=15" in out
    assert "\nPYTORCH_ALLOC_CONF=expandable_segments:True\n" in out
    assert f"$ {launcher} --log_level error --hostfile hosts" in err
    # Tests are kept on the CPU by the first of them, and so are the other hosts.
    assert "variables passed to the hosts: DS_ACCELERATOR, OMP_NUM_THREADS, PATH, PYTORCH_ALLOC_CONF\n" in err

    script(tmp_path, monkeypatch, "torchrun", 'echo "started: $*"; exit 4')
    assert launch("torchrun", recipe, "--nproc_per_node", "2", "--adapter.r", "6") == 4
    out, _ = capfd.readouterr()
    assert out == "started: --standalone --nproc_per_node 2 -m malora_dist.train r.yaml --adapter.r 6\n"


@pytest.mark.e2e
def test_a_hostfile_needs_no_torch(recipe: str) -> None:
    arguments = ["launch", "deepspeed", recipe, "--hostfile", "hosts", "--include", "10.0.0.3", "--dry-run"]
    done = malora_without_torch(*arguments)
    assert done.returncode == 0, done.stderr
