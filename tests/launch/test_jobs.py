"""jobs.jsonl, and which jobs belong to which run folder."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from malora_dist.launch.jobs import JOBS_FILE, SubmittedJob, append_job, array_tasks, jobs_of, read_jobs, runs_of

ONE = SubmittedJob(
    "12", "train", "2026-11-25T08:30:00+0000", "/runs/a/slurm/train_12.out", "/runs/a/slurm/train_12.sbatch"
)
ARRAY = replace(ONE, job="20", array="1-3,8%2", log="/runs/a/slurm/train_20_%a.out")


def written(run: Path, *jobs: SubmittedJob) -> Path:
    folder = run / "slurm"
    folder.mkdir(parents=True)
    for job in jobs:
        append_job(folder, job)
    return folder


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    jobs = [ONE, replace(ONE, job="13", stage="evaluate", after="12"), ARRAY]
    assert read_jobs(written(tmp_path, *jobs)) == jobs
    assert read_jobs(tmp_path) == []


def test_damaged_and_half_written_lines_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path, ONE)
    for rubbish in (b"\x00\xff\n", b"[1]\n", b'{"job": "9"}\n', b"\n", b'{"job": "1'):
        with (folder / JOBS_FILE).open("ab") as file:
            file.write(rubbish)
    with caplog.at_level(logging.WARNING):
        assert read_jobs(folder) == [ONE]
    assert len(caplog.records) == 4 and f"{folder / JOBS_FILE}:2: damaged" in caplog.text
    append_job(folder, ARRAY)
    assert read_jobs(folder) == [ONE, ARRAY], "what comes after half a line is whole"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1-3", [1, 2, 3]), ("4", [4]), ("0-9:3%2", [0, 3, 6, 9]), ("1,3,8-9", [1, 3, 8, 9]), ("x", []), ("0", [0])],
)
def test_tasks_of_an_array(text: str, numbers: list[int]) -> None:
    assert array_tasks(text) == numbers


def test_an_arrays_tasks_are_jobs_of_their_own_folders(tmp_path: Path) -> None:
    written(tmp_path, ARRAY)
    runs = runs_of(tmp_path)
    assert [run.name for run in runs] == ["seed-1", "seed-2", "seed-3", "seed-8"]
    (job,) = jobs_of(runs[3])
    assert (job.job, job.log, job.array) == ("20_8", "/runs/a/slurm/train_20_8.out", None)
    assert jobs_of(tmp_path) == jobs_of(tmp_path / "seed-4") == []


def test_a_run_has_its_own_jobs_alone(tmp_path: Path) -> None:
    again = replace(ONE, job="30")
    written(tmp_path, ONE, ARRAY, again)
    assert jobs_of(tmp_path) == [ONE, again]
    assert runs_of(tmp_path)[0] == tmp_path
    written(tmp_path / "seed-1", replace(ONE, job="40"))
    assert [job.job for job in jobs_of(tmp_path / "seed-1")] == ["20_1", "40"], "started again by hand, alone"


def test_a_folder_without_jobs_is_a_run(tmp_path: Path) -> None:
    assert runs_of(tmp_path) == [tmp_path] and jobs_of(tmp_path) == []
