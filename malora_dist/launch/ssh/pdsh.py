"""The command that starts a run on several hosts: deepspeed's, which starts it there with pdsh over ssh.

deepspeed hands words on to the hosts' shells as they are, but for those with a blank, which it puts in double quotes;
and it hands on few variables. So words are quoted, and variables written to a file, as it expects them.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from malora_dist.errors import ConfigError
from malora_dist.launch.command import QUIET

# Without GPUs deepspeed hands on the variables of Python alone.
VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "XDG_CACHE_HOME", "CUDA_HOME")
FAMILIES = (
    "DS_", "GLOO_", "HF_", "MALORA_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_",
    "TRITON_",
)  # fmt: skip
# What is handed on can be read by all who can list the processes of the host.
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD)(_|$)")
ENV_FILE = "DS_ENV_FILE"
SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
# End a connection to a host that is gone after a minute, and never ask for a password.
ALIVE = "-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def hosts_command(
    module: str,
    arguments: Sequence[str],
    *,
    hostfile: Path,
    selection: Sequence[str],
    place: Sequence[str],
    launcher: str = "deepspeed",
) -> list[str]:
    """Return the command that runs `python -m module arguments` once for each slot of the hosts.

    `selection` holds --include or --exclude, `place` --master_addr and --master_port. Raises ConfigError in a
    folder, or for a Python, whose path deepspeed cannot hand on.
    """
    for what, path in (("this folder", os.getcwd()), ("this Python", sys.executable)):
        if shlex.quote(path) != path or "%" in path:
            raise ConfigError(f"{path}: the deepspeed launcher cannot pass on the path of {what}, it does not quote it")
    # Without --force_multi deepspeed takes the one host of a file for this machine. ssh has been checked already.
    fixed = ["--force_multi", "--no_ssh_check", "--launcher", "pdsh"]
    words = ["--hostfile", str(hostfile), *selection, *place, *fixed, "--module", module]
    return [launcher, *QUIET, *words, *(quoted(argument) for argument in arguments)]


def quoted(argument: str) -> str:
    """Return what deepspeed and pdsh turn into a word that the hosts' shells read as `argument`."""
    if " " in argument:
        # deepspeed adds the double quotes, and a \ before each of those inside.
        escaped = re.sub(r"([\\$`])", r"\\\1", argument)
    else:
        escaped = shlex.quote(argument)
    # pdsh replaces %h, %n and %u.
    return escaped.replace("%", "%%")


def handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the processes on the other hosts get too; no passwords, keys and tokens."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in VARIABLES or name.startswith(FAMILIES)) and not SECRET.search(name) and name != ENV_FILE
        if value and "\n" not in value
    }


def runner_environment(environment: Mapping[str, str], env_file: Path) -> dict[str, str]:
    """Return the environment for deepspeed itself: the file of variables, and options of ssh after the user's own."""
    own = environment.get(SSH_ARGUMENTS, "")
    return {**environment, ENV_FILE: str(env_file), SSH_ARGUMENTS: f"{own} {ALIVE}".strip()}


def env_file_text(variables: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Return the text of a DS_ENV_FILE: the variables, and after them what deepspeed would have read without it.

    Raises ConfigError for a line of those files that is no NAME=VALUE.
    """
    # deepspeed puts a value in double quotes where that is needed.
    escaped = {name: re.sub(r'([\\$`"])', r"\\\1", value).replace("%", "%%") for name, value in variables.items()}
    lines = [f"{name}={value}" for name, value in escaped.items()]
    own = environment.get(ENV_FILE, ".deepspeed_env")
    for path in dict.fromkeys([Path.home() / own, Path(own)]):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            if "=" not in line and line.strip():
                raise ConfigError(f"{path}: {line.strip()!r} is not NAME=VALUE, as deepspeed requires")
            lines += [line] if line.strip() else []
    return "".join(f"{line}\n" for line in lines)
