"""What Slurm tells a process of its job. tests/slurm has a real one."""

import os
import stat
import time
from pathlib import Path

import pytest

from malora_dist.launch.slurm.scheduler import Slurm


@pytest.mark.e2e
def test_slurm_is_asked_where_it_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A squeue of our own stands for the cluster's; tests/slurm runs the real one."""
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for answer, left in (("1:00:00", 3600), ("UNLIMITED", None)):
        squeue.write_text(f'#!/bin/sh\n[ "$3" = 17 ] && echo "{answer}"\n')
        squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
        end = Slurm().end_time(os.environ)
        assert (end is None) if left is None else (end == pytest.approx(time.time() + left, abs=30))
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert Slurm().end_time(os.environ) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert Slurm().end_time(os.environ) is None
