"""The ssh check: whether a launcher can start processes on all hosts, before it starts any."""

import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from malora_dist.errors import ConfigError
from malora_dist.launch.ssh.hostfile import addresses

CONNECT_SECONDS, ANSWER_SECONDS = 5, 30


def check_hosts(hosts: Sequence[str], folder: Path) -> None:
    """Check that ssh reaches all hosts without a password, and finds `folder` and this Python at the same paths there.

    All are asked at the same time. Raises ConfigError with every host that fails, and ssh's message.
    """
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        said = list(pool.map(lambda host: _ask(host, folder), hosts))
    failed = [f"{host}: {words}" for host, words in zip(hosts, said, strict=True) if words]
    if failed:
        raise ConfigError(
            "\n  ".join(["these hosts cannot be used; nothing was started:", *failed])
            + "\n`ssh HOST true` must work on each without a prompt, with this folder and Python at the same paths."
        )


def is_this_machine(host: str) -> bool:
    """Return whether the name stands for an address of this machine."""
    return any(_is_ours(address) for address in addresses(host))


def _ask(host: str, folder: Path) -> str | None:
    """Return the last line of what goes wrong on a host, None if nothing does."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    question = f"cd {shlex.quote(str(folder))} && ls {shlex.quote(sys.executable)}"
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {ANSWER_SECONDS} s"
    except OSError as error:
        raise ConfigError(f"cannot start ssh: {error.strerror}; is it installed here?") from error
    if done.returncode == 0:
        return None
    return next(reversed(done.stderr.strip().splitlines()), f"ssh exits with code {done.returncode}")


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True
