"""The command that starts a run's processes on this machine, and running it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from malora_dist.errors import ConfigError
from malora_dist.launch.environment import allocator_variables

# The deepspeed launcher replaces the list of visible devices by 0..N-1 unless it is told which ones.
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# Without its INFO lines, which name each process that it starts; failures are logged as errors.
QUIET = ("--log_level", "error")
# What `deepspeed` starts, one on each node, to start the ranks.
NODE_LAUNCHER = "deepspeed.launcher.launch"
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Ctrl-C, and a terminal that is closed, for ranks SIGUSR1: SIGINT ends those that still import with a traceback, and
# SIGTERM makes them say that another one may have failed.
TERMINAL = (signal.SIGINT, signal.SIGHUP)


def deepspeed_command(
    module: str,
    arguments: Sequence[str],
    *,
    num_gpus: int,
    environment: Mapping[str, str],
    launcher: str = "deepspeed",
    options: Sequence[str] = (),
) -> list[str]:
    """Return the command that runs `python -m module arguments` once for each of `num_gpus` devices of this machine.

    Args:
        module, arguments: Of each process.
        num_gpus: The number of devices, and of processes.
        environment: Says which devices are visible (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES).
        launcher: The path of deepspeed.
        options: More options of deepspeed.

    Raises:
        ConfigError: If the visible devices are fewer, or named in a way the launcher cannot pass on.
    """
    return [launcher, *QUIET, *_devices(num_gpus, environment), *options, "--module", module, *arguments]


def refuses_gpus(environment: Mapping[str, str]) -> bool:
    """Return whether DS_ACCELERATOR=cpu, which DeepSpeed obeys, keeps a run on the CPU of a machine with GPUs."""
    return environment.get("DS_ACCELERATOR") == "cpu"


def count_gpus(environment: Mapping[str, str]) -> int:
    """Return the number of GPUs that torch can see and a run may use."""
    if refuses_gpus(environment):
        return 0
    from torch import cuda

    return cuda.device_count()


def visible_gpus() -> int:
    """Return the number of GPUs a run may use, at least 1: without any, one process runs on the CPU."""
    return max(1, count_gpus(os.environ))


def launcher_path(name: str = "deepspeed") -> str:
    """Return the path of a script of this Python's environment, so that it works without an activated one."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher's environment: this Python's scripts (ninja, deepspeed) come first on PATH; the allocator.

    Unbuffered, since output that cannot be written at the end makes Python exit with 120.
    """
    scripts = str(Path(sys.executable).parent)
    own = {**environment, **allocator_variables(environment), "PYTHONUNBUFFERED": "1"}
    return {**own, "PATH": os.pathsep.join([scripts, environment.get("PATH", os.defpath)])}


def run_command(command: Sequence[str], environment: Mapping[str, str], *, local: bool = True) -> int:
    """Run a launcher and wait.

    SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C and a terminal that is closed go to the ranks (`pass_on`), which save and exit.

    Args:
        command: The launcher and its arguments.
        environment: All of its variables.
        local: Whether all ranks are on this machine. The launcher is then kept from Ctrl-C, at which it would end with
            a traceback before the ranks have saved; otherwise it ends the ranks of other machines at Ctrl-C itself.

    Returns:
        The exit code; 128 + n if signal n ended the command.

    Raises:
        ConfigError: If it cannot start.
    """
    apart: dict[str, Any] = {"process_group": 0, "stdin": subprocess.DEVNULL} if local else {}
    try:
        process = subprocess.Popen(command, env=dict(environment), **apart)
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]}: {error.strerror}; is it installed here?") from error

    def stop(number: int, _frame: object) -> None:
        pass_on(signal.SIGUSR1 if number in TERMINAL else number, process.pid)
        if number == signal.SIGINT:
            print("Ctrl-C: the processes are told to save and end", file=sys.stderr, flush=True)

    handlers: dict[signal.Signals, Any] = dict.fromkeys((*PASSED_ON, *TERMINAL) if local else PASSED_ON, stop)
    if not local:
        handlers[signal.SIGINT] = signal.SIG_IGN
    # nohup
    handlers = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def pass_on(number: int, launcher: int) -> None:
    """Send a signal to the ranks that a launcher has started; before there are any, end it.

    The ranks get it themselves: on one machine `deepspeed` dies of SIGTERM and leaves what it has started running, and
    that kills the ranks 30 seconds after it has passed a signal on.

    Args:
        number: The signal.
        launcher: The launcher's process id.
    """
    ranks, node_launchers = _started(launcher)
    for pid in ranks or [*node_launchers, launcher]:
        with suppress(ProcessLookupError):
            os.kill(pid, number if ranks else signal.SIGTERM)


def _started(launcher: int) -> tuple[list[int], list[int]]:
    """Return the ids of the ranks below a launcher, and of DeepSpeed's launchers of one node."""
    import psutil

    ranks: list[int] = []
    node_launchers: list[int] = []
    unseen = [launcher]
    while unseen:
        with suppress(psutil.Error):
            for child in psutil.Process(unseen.pop()).children():
                if "LOCAL_RANK" in child.environ():
                    ranks.append(child.pid)
                    continue
                unseen.append(child.pid)
                if NODE_LAUNCHER in child.cmdline():
                    node_launchers.append(child.pid)
    return ranks, node_launchers


def _devices(num_gpus: int, environment: Mapping[str, str]) -> list[str]:
    # -1 hides all GPUs: the processes run on the CPU.
    name = next((name for name in VISIBLE_DEVICES if environment.get(name, "").strip() not in ("", "-1")), None)
    if name is None:
        return ["--num_gpus", str(num_gpus)]
    devices = [device.strip() for device in environment[name].split(",")]
    if not all(device.isdigit() for device in devices):
        raise ConfigError(f"{name}={environment[name]}: the deepspeed launcher needs device numbers; or use torchrun")
    if len(devices) < num_gpus:
        raise ConfigError(f"--num_gpus {num_gpus}: {name}={environment[name]} names only {len(devices)} device(s)")
    return ["--include", f"localhost:{','.join(devices[:num_gpus])}"]
