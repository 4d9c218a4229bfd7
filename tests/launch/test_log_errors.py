"""Which line of a log says why a job failed. Those of Slurm are as Slurm 22.05 has written them."""

from pathlib import Path

import pytest

from malora_dist.launch.log_errors import TAIL_BYTES, last_error, last_line

TASK_FAILED = """\
srun: error: node2: task 1: Exited with exit code 7
srun: launch/slurm: _step_signal: Terminating StepId=21.0
slurmstepd-node1: error: *** STEP 21.0 ON node1 CANCELLED AT 2026-11-25T08:47:14 ***
srun: error: node1: task 0: Terminated
srun: Force Terminated StepId=21.0
"""
KILLED = "srun: error: node1: task 0: Killed\nsrun: Force Terminated StepId=23.0\n"
CANCELLED = """\
srun: got SIGCONT
srun: Job step aborted: Waiting up to 5 seconds for job step to finish.
slurmstepd-node1: error: *** JOB 24 ON node1 CANCELLED AT 2026-11-25T08:47:25 ***
srun: forcing job termination
slurmstepd-node1: error: *** STEP 24.0 ON node1 CANCELLED AT 2026-11-25T08:47:25 ***
srun: error: node1: task 0: Terminated
"""
TRACEBACK = """\
Traceback (most recent call last):
  File "x.py", line 3, in <module>
    f()
    ^^^
  File "x.py", line 1, in f
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
"""
OUT_OF_MEMORY = TRACEBACK.splitlines()[-1]
LOST = "[rank 1] timed out waiting for another process (all processes): it failed, which its own message explains\n"


def spoken(speaker: str, text: str) -> str:
    return "".join(f"{speaker}{line}\n" for line in text.splitlines())


def error_of(tmp_path: Path, text: str) -> str | None:
    (tmp_path / "log").write_text(text)
    return last_error(tmp_path / "log")


@pytest.mark.parametrize("speaker", ["", "[default0]:", "[rank0]: ", "[default0]:[rank0]: ", "0: ", "12: [rank12]: "])
def test_the_last_line_of_a_traceback(tmp_path: Path, speaker: str) -> None:
    assert error_of(tmp_path, "08:30:00 step 3\n" + spoken(speaker, TRACEBACK) + "08:30:01 step 4\n") == OUT_OF_MEMORY


def test_tracebacks_of_several_processes_at_once(tmp_path: Path) -> None:
    other = TRACEBACK.replace(OUT_OF_MEMORY, "KeyError: 'x'")
    lines = zip(spoken("[default0]:", TRACEBACK).splitlines(), spoken("[default1]:", other).splitlines(), strict=True)
    mixed = "".join(f"{a}\n{b}\n" for a, b in lines)
    assert error_of(tmp_path, mixed) == "KeyError: 'x'"


def test_what_a_run_says_itself(tmp_path: Path) -> None:
    logged = "2026-11-25 08:30:00,123 INFO step 3 loss 1.2\n2026-11-25 08:30:01,000 ERROR loss is nan at step 4\n"
    assert error_of(tmp_path, logged) == "loss is nan at step 4"
    assert error_of(tmp_path, "[default1]:[rank 3] data.tasks: no row\n  a note\n") == "data.tasks: no row"
    said = spoken("", "[rank 0] " + TRACEBACK)
    assert error_of(tmp_path, said) == OUT_OF_MEMORY


def test_a_cause_goes_before_what_others_say_of_it(tmp_path: Path) -> None:
    elastic = "Traceback (most recent call last):\n  File\ntorch.distributed.elastic.x.ChildFailedError: \n=====\n"
    assert error_of(tmp_path, TRACEBACK + LOST + elastic + TASK_FAILED) == OUT_OF_MEMORY
    assert error_of(tmp_path, LOST + KILLED) == "srun: error: node1: task 0: Killed"
    assert error_of(tmp_path, LOST) == LOST.removeprefix("[rank 1] ").strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [(TASK_FAILED, "srun: error: node2: task 1: Exited with exit code 7"),
     (KILLED, "srun: error: node1: task 0: Killed"),
     (CANCELLED, "slurmstepd-node1: error: *** JOB 24 ON node1 CANCELLED AT 2026-11-25T08:47:25 ***")],
)  # fmt: skip
def test_what_slurm_says(tmp_path: Path, text: str, said: str) -> None:
    assert error_of(tmp_path, text) == said


def test_the_latest_start_that_says_something(tmp_path: Path) -> None:
    begin = "job 7, start {}: runs/a on node[1-2], 2 processes\n"
    requeued = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-25T08:47:25 DUE TO JOB REQUEUE ***\n"
    first = begin.format(1) + TRACEBACK + requeued
    assert error_of(tmp_path, first + begin.format(2) + "08:30:00 step 3\n") == OUT_OF_MEMORY
    assert error_of(tmp_path, first + begin.format(2) + LOST + KILLED) == "srun: error: node1: task 0: Killed"


def test_a_log_without_errors(tmp_path: Path) -> None:
    assert error_of(tmp_path, "08:30:00 step 3 of 10, errors 0\n08:30:01 note: it may warn of errors\n") is None
    assert error_of(tmp_path, "") is None
    assert last_error(tmp_path / "missing") is None and last_line(tmp_path / "missing") is None


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    assert error_of(tmp_path, TRACEBACK + "x" * 99 + "\n" * TAIL_BYTES + "08:30:00 step 3\n\n") is None
    assert last_line(tmp_path / "log") == "08:30:00 step 3"
