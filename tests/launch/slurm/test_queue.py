"""States of jobs in words, and a Slurm that does not tell."""

from pathlib import Path

import pytest

from malora_dist.launch.scheduler import JobState
from malora_dist.launch.slurm import queue
from malora_dist.launch.slurm.queue import FORGOTTEN, job_states
from tests.launch.slurm_clients import NO_ACCOUNTING, NO_CONTROLLER, NO_SUCH_JOB, SQUEUE, Clients, make_clients

pytestmark = pytest.mark.e2e


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    return make_clients(tmp_path / "bin", monkeypatch)


def test_states_and_reasons_in_words(clients: Clients) -> None:
    clients.say("squeue", SQUEUE)
    found = {job: str(state) for job, state in job_states(line.split("|")[0] for line in SQUEUE.splitlines()).items()}
    assert found == {
        "5": "cancelled (never starts: the job before it did not succeed)",
        "13": "cancelled",
        "2": "completed",
        "3": "failed (its script failed)",
        "4": "pending (never starts: the job before it did not succeed)",
        "6": "pending (waits for free nodes)",
        "7": "pending (waits behind other jobs)",
        "8": "pending (never starts here: more nodes than the partition has)",
        "9": "pending (starts after a pause)",
        "11_3": "pending (waits for other tasks of the array)",
        "12": "pending (waits for the job before it)",
        "10": "pending (held: scontrol release)",
        "11_1": "running",
        "11_2": "running",
        "19": "completing",
    }
    assert len(clients.calls) == 1, "Slurm is asked once for all jobs"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1|PENDING|ReqNodeNotAvail, UnavailableNodes:node3", "its nodes are down or reserved: UnavailableNodes:node3"),
        ("1|PENDING|AssocGrpCpuLimit", "waits: AssocGrpCpuLimit"),
        ("1|PENDING|launch failed requeued held", "held: it could not be launched; scontrol release"),
        ("1|PENDING|None", ""),
        ("1|FAILED|NodeFail", "NodeFail"),
    ],
)
def test_reasons_of_many_words_and_without_any(clients: Clients, line: str, said: str) -> None:
    clients.say("squeue", line + "\n")
    assert job_states(["1"])["1"].reason == said


def test_which_states_are_an_end(clients: Clients) -> None:
    clients.say("squeue", SQUEUE)
    found = job_states(["2", "3", "5", "6", "19", "11_1"])
    assert [found[job].ended for job in ("2", "3", "5", "6", "19", "11_1")] == [True, True, True, False, False, False]


def test_what_squeue_has_forgotten_is_in_the_accounting(clients: Clients) -> None:
    clients.say("squeue", SQUEUE)
    clients.say("sacct", "1|CANCELLED by 0\n14_2|NODE_FAIL\n14_2|COMPLETED\n")
    found = job_states(["1", "2", "14_2", "15"])
    assert found == {
        "1": JobState("CANCELLED"), "2": JobState("COMPLETED"), "14_2": JobState("COMPLETED"),
        "15": FORGOTTEN,
    }  # fmt: skip
    assert found["15"].ended
    assert clients.calls[1:] == ["sacct --noheader --parsable2 -X --format=JobID,State --jobs=1,14_2,15"]


def test_without_accounting_the_file_of_completed_jobs_tells_of_whole_jobs(clients: Clients) -> None:
    """Of an array it lists one task under the array's number, and the others under numbers of their own."""
    clients.say("squeue", error=NO_SUCH_JOB, code=1)
    clients.say("sacct", "1|NODE_FAIL\n1|COMPLETED\n11|COMPLETED\n")
    text = (clients.folder / "sacct").read_text()
    refuse = f'[[ "$1" == -c ]] || {{ echo "{NO_ACCOUNTING.strip()}" >&2; exit 1; }}\n'
    (clients.folder / "sacct").write_text(text.replace("\nwhile", f"\n{refuse}while"))
    assert job_states(["1", "11_2"]) == {"1": JobState("COMPLETED"), "11_2": FORGOTTEN}
    assert clients.calls[-1] == "sacct -c --noheader --parsable2 --format=JobID,State --jobs=1"


def test_a_slurm_that_does_not_answer(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    clients.say("squeue", error=NO_CONTROLLER, code=1)
    (state,) = job_states(["1"]).values()
    assert state == JobState("UNKNOWN", f"squeue: {NO_CONTROLLER.strip()}") and not state.ended
    clients.say("squeue", SQUEUE, seconds=5)
    monkeypatch.setattr(queue, "SECONDS", 0.5)
    assert str(job_states(["2"])["2"]) == "unknown (squeue does not answer)"


def test_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["1"]) == {"1": JobState("UNKNOWN", "there is no squeue here")}


def test_a_broken_answer_is_left_out(clients: Clients) -> None:
    clients.say("squeue", "1|RUNNING|None\n2|RUNN\n\n")
    assert job_states(["1", "2"]) == {"1": JobState("RUNNING"), "2": FORGOTTEN}


def test_nobody_is_asked_about_nothing(clients: Clients) -> None:
    assert job_states([]) == {}
