"""Programs that stand in for Slurm's clients and say what those of Slurm 22.05 have said. tests/slurm has real ones."""

import os
from pathlib import Path

import pytest

# squeue --noheader --states=all --array --format=%i|%T|%r
SQUEUE = """\
5|CANCELLED|DependencyNeverSatisfied
13|CANCELLED|Priority
2|COMPLETED|None
3|FAILED|NonZeroExitCode
4|PENDING|DependencyNeverSatisfied
6|PENDING|Resources
7|PENDING|Priority
8|PENDING|PartitionNodeLimit
9|PENDING|BeginTime
11_3|PENDING|JobArrayTaskLimit
12|PENDING|Dependency
10|PENDING|JobHeldUser
11_1|RUNNING|None
11_2|RUNNING|None
19|COMPLETING|None
"""
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
NO_SUCH_JOB = "slurm_load_jobs error: Invalid job id specified\n"
NO_ACCOUNTING = "Slurm accounting storage is disabled\n"


class Clients:
    """A folder that comes first on PATH; `calls` has the command line of each call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def say(self, program: str, out: str = "", error: str = "", code: int = 0, *, seconds: float = 0) -> None:
        """Let a program print, and end with an exit code. A line is printed only if its job is asked for."""
        (self.folder / f"{program}.out").write_text(out)
        (self.folder / f"{program}.err").write_text(error)
        text = (
            f'#!/usr/bin/env bash\ncd "{self.folder}"\necho "{program} $*" >> calls\nsleep {seconds}\n'
            f'jobs=" ${{*##*--jobs=}} "\njobs="${{jobs//,/ }}"\n'
            f'while IFS= read -r line; do [[ "$jobs" != *" ${{line%%|*}} "* ]] || echo "$line"; done < {program}.out\n'
            f"cat {program}.err >&2\nexit {code}\n"
        )
        path = self.folder / f".{program}.new"
        path.write_text(text)
        path.chmod(0o755)
        path.replace(self.folder / program)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


def make_clients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """At first of a Slurm that knows no job and keeps no accounts."""
    clients = Clients(folder)
    clients.say("squeue")
    clients.say("sacct", error=NO_ACCOUNTING, code=1)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return clients
