import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from malora_dist.errors import ConfigError
from malora_dist.launch.command import (
    count_gpus,
    deepspeed_command,
    launcher_environment,
    run_command,
)

RECIPE = ["r.yaml", "--adapter.r", "16"]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        pytest.param("", "--num_gpus 2", id="all-devices"),
        pytest.param("-1", "--num_gpus 2", id="no-gpus"),
        pytest.param("4,6,7", "--include localhost:4,6", id="chosen-devices"),
    ],
)
def test_golden_argv(visible: str, devices: str) -> None:
    golden = f"deepspeed --log_level error {devices} --module malora_dist.train r.yaml --adapter.r 16"
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    assert deepspeed_command("malora_dist.train", RECIPE, num_gpus=2, environment=environment) == golden.split()


def test_deepspeed_reads_the_argv_as_meant() -> None:
    runner = import_module("deepspeed.launcher.runner")
    command = deepspeed_command("malora_dist.train", RECIPE, num_gpus=2, environment={})
    args = runner.parse_args(command[1:])
    assert (args.num_gpus, args.module, args.user_script, args.user_args) == (2, True, "malora_dist.train", RECIPE)
    assert args.log_level == "error"


def test_deepspeeds_own_variable_keeps_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_gpus({}) == count_gpus({"DS_ACCELERATOR": "cuda"}) == 4
    assert count_gpus({"DS_ACCELERATOR": "cpu"}) == 0


@pytest.mark.parametrize(("visible", "message"), [("0", "names only 1"), ("GPU-5f", "needs device numbers")])
def test_devices_that_cannot_be_had(visible: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_command("m", [], num_gpus=2, environment={"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.e2e
def test_exit_codes_and_environment() -> None:
    environment = launcher_environment({**os.environ, "MALORA_TEST": "7"})
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert launcher_environment({"PYTORCH_ALLOC_CONF": ""})["PYTORCH_ALLOC_CONF"] == ""
    assert environment["PATH"].startswith(os.path.dirname(sys.executable) + os.pathsep)
    code = "import os, sys; sys.exit(int(os.environ['MALORA_TEST']))"
    assert run_command([sys.executable, "-c", code], environment) == 7
    assert run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], environment) == 137
    with pytest.raises(ConfigError, match="cannot start no-such-launcher"):
        run_command(["no-such-launcher"], environment)


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_termination_reaches_the_command(number: signal.Signals) -> None:
    """A signal to `malora train` must not leave the ranks behind."""
    child = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, sys; from malora_dist.launch.command import run_command;"
        f"sys.exit(run_command([sys.executable, '-c', {child!r}], os.environ))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    while not catches(process.pid, number):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=200) == 5
    process.stdout.close()


RANK = "import signal, sys, time; signal.signal({}, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(99)"
# As `deepspeed` on one machine: dies of SIGTERM, and so does its code for a node, which has started the rank.
LAUNCHER = """
import os, subprocess, sys
code, rank = sys.argv[1], {rank!r}
if code == "node":
    command = [sys.executable, "-c", rank]
    sys.exit(subprocess.run(command, env={{**os.environ, "LOCAL_RANK": "0"}}).returncode)
sys.exit(subprocess.run([sys.executable, "-c", code, "node"]).returncode)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGHUP, signal.SIGUSR1),
        (signal.SIGINT, signal.SIGUSR1),
    ],
)
def test_a_signal_reaches_the_ranks_and_not_their_launchers(sent: signal.Signals, received: signal.Signals) -> None:
    """A terminal sends SIGINT, for Ctrl-C, and SIGHUP to all of its group."""
    rank = RANK.format(int(received))
    launcher = LAUNCHER.format(rank=rank)
    parent = (
        "import os, signal, sys; from malora_dist.launch.command import run_command;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
        f"sys.exit(run_command([sys.executable, '-c', {launcher!r}, {launcher!r}], os.environ))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    os.killpg(process.pid, sent)
    assert process.wait(timeout=200) == 75
    process.stdout.close()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (line,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(line, 16) >> (number - 1) & 1)
