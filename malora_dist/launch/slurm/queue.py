"""States of jobs, from squeue and sacct, and their reasons in words."""

import os
import subprocess
from collections.abc import Iterable, Sequence

from malora_dist.launch.scheduler import UNKNOWN, JobState

# Slurm's own clients take 20 s to find out that its controller is gone.
SECONDS = 30
FORGOTTEN = JobState(UNKNOWN, "Slurm does not know it any more", forgotten=True)
WORDS = {
    "Resources": "waits for free nodes",
    "Priority": "waits behind other jobs",
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "never starts: the job before it did not succeed",
    "BeginTime": "starts after a pause",
    "PartitionNodeLimit": "never starts here: more nodes than the partition has",
    "PartitionTimeLimit": "never starts here: more time than the partition gives",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "NodeDown": "a node is down",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for a licence",
    "JobArrayTaskLimit": "waits for other tasks of the array",
    "JobHeldUser": "held: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held: it was requeued too often",
    "launch failed requeued held": "held: it could not be launched; scontrol release",
    "NonZeroExitCode": "its script failed",
    "RaisedSignal": "a signal ended it",
    "TimeLimit": "its time limit",
    "OutOfMemory": "no memory left",
}
# Reasons of an earlier state, which squeue still prints for a job that runs or has ended.
STALE = {"Resources", "Priority", "Dependency", "BeginTime", "None", ""}


def job_states(ids: Iterable[str]) -> dict[str, JobState]:
    """Return the states of jobs and of tasks of arrays (`123_4`), by their ids.

    Asks squeue first, and sacct for the jobs that squeue has forgotten. Never raises: if Slurm is missing or does not
    answer, the state is UNKNOWN with the reason.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    lines, problem = _ask(["squeue", "--noheader", "--states=all", "--array", "--format=%i|%T|%r"], wanted)
    found = {parts[0]: _state(*parts[1:]) for line in lines if len(parts := line.split("|")) == 3}
    missing = [job for job in wanted if job not in found]
    if missing:
        found |= _accounted(missing)
    unknown = JobState(UNKNOWN, problem) if problem else FORGOTTEN
    return found | {job: unknown for job in missing if job not in found}


def _accounted(ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states that the accounting has, else those of the file of completed jobs, which has no array tasks."""
    lines, problem = _ask(["sacct", "--noheader", "--parsable2", "-X", "--format=JobID,State"], ids)
    if problem:
        whole = [job for job in ids if "_" not in job]
        lines = _ask(["sacct", "-c", "--noheader", "--parsable2", "--format=JobID,State"], whole)[0] if whole else []
    # A line for each run of a job that was requeued, the last one last.
    rows = [line.split("|") for line in lines if line.count("|") == 1]
    return {job: JobState(state.split()[0]) for job, state in rows if state and job in ids}


def _state(state: str, reason: str) -> JobState:
    if state != "PENDING" and reason in STALE:
        return JobState(state)
    # "ReqNodeNotAvail, UnavailableNodes:node3", and more reasons than are in the table.
    first, _, rest = reason.partition(",")
    words = WORDS.get(first, "" if first in ("None", "") else f"waits: {first}" if state == "PENDING" else first)
    return JobState(state, f"{words}:{rest}" if rest else words)


def _ask(command: Sequence[str], ids: Sequence[str]) -> tuple[list[str], str]:
    """Return the lines that a Slurm client prints, and in words why there are none."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [*command, f"--jobs={','.join(ids)}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return [], f"{command[0]} does not answer"
    except OSError:
        return [], f"there is no {command[0]} here"
    if done.returncode and "Invalid job id" in done.stderr:
        return [], ""
    said = done.stderr.strip().splitlines()
    return done.stdout.splitlines(), f"{command[0]}: {said[-1] if said else 'failed'}" if done.returncode else ""
