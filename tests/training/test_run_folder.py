"""Run folders are claimed once and never overwritten; their files are whole or absent."""

import json
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from malora_dist.errors import ConfigError, TrainingError
from malora_dist.files.atomic import write_json
from malora_dist.training.run_folder import claim_run_folder, evaluation_file, lock_run_folder, lock_seconds
from tests.processes import start, wait


def claim(wanted: Path | str) -> str:
    """The name of a folder that a run claims and leaves its config in."""
    folder, lock = claim_run_folder(wanted)
    (folder / "config.yaml").touch()
    lock.release()
    return folder.name


def test_a_taken_folder_is_never_reused(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "deep" / "demo"
    assert [claim(wanted) for _ in range(3)] == ["demo", "demo-2", "demo-3"]
    shutil.rmtree(wanted.parent / "demo-2")
    assert claim(str(wanted)) == "demo-2"
    (wanted.parent / "file").touch()
    assert claim(wanted.parent / "file") == "file-2"


def test_a_folder_without_a_run_is_taken_over(tmp_path: Path) -> None:
    """One made for the job's log, or by a start that was killed at once; never one with a file of ours in it."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "17.log").write_text("submitted")
    assert claim(tmp_path / "logs") == "logs" and (tmp_path / "logs" / "17.log").read_text() == "submitted"
    for name in ("eval.json", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).mkdir()
        assert claim(tmp_path / name) == f"{name}-2"


def test_a_folder_in_which_a_process_trains_is_not_for_another(tmp_path: Path) -> None:
    folder, lock = claim_run_folder(tmp_path / "run")
    assert claim(tmp_path / "run") == "run-2"
    with pytest.raises(TrainingError, match="run: another process is training in it"):
        lock_run_folder(folder, seconds=0.5)
    lock.release()
    lock_run_folder(folder).release()


def test_a_requeued_job_waits_for_what_is_left_of_the_start_before() -> None:
    assert lock_seconds({}, 1800) == lock_seconds({"SLURM_RESTART_COUNT": "0"}, 1800) == 30
    assert lock_seconds({"SLURM_RESTART_COUNT": "2"}, 1800) == 1440
    # Never longer than the others wait.
    assert lock_seconds({}, 10) == 8


@pytest.mark.distributed
def test_processes_that_claim_at_once_get_different_folders(tmp_path: Path) -> None:
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    function = "tests.training.test_run_folder:claim_often"
    assert wait([start(function, [str(tmp_path), number], log) for number, log in enumerate(logs)]) == [0, 0, 0]
    claims = [log.read_text().split() for log in logs]
    assert [len(names) for names in claims] == [40, 40, 40]
    assert sorted(sum(claims, [])) == sorted(["demo", *(f"demo-{number}" for number in range(2, 121))])


def claim_often(folder: str, number: int) -> None:
    """Claim forty folders together with two other processes, and keep them until those have theirs."""
    place = Path(folder)
    (place / f"ready{number}").touch()
    while len(list(place.glob("ready*"))) < 3:
        pass
    claims = [claim_run_folder(place / "runs" / "demo") for _ in range(40)]
    print(*(path.name for path, _ in claims), flush=True)
    (place / f"done{number}").touch()
    while len(list(place.glob("done*"))) < 3:
        time.sleep(0.01)


def test_a_place_that_cannot_be_written_is_a_mistake_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output_dir in (tmp_path / "file" / "run", tmp_path / "file" / "below" / "run"):
        with pytest.raises(ConfigError, match=rf"output_dir={output_dir} cannot be created: \w+"):
            claim_run_folder(output_dir)


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_folder_without_a_name_is_a_mistake_in_the_recipe(name: str) -> None:
    with pytest.raises(ConfigError, match="must end in the name"):
        claim_run_folder(name)


@pytest.mark.distributed
def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write_json(path, {"task": "é", "n": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"task": "é", "n": [1, 2.5, None]}
    log = tmp_path.with_name("log")
    assert wait([start("tests.training.test_run_folder:write_until_killed", [str(path)], log)]) == [-signal.SIGXFSZ]
    assert json.loads(path.read_text()) == {"task": "é", "n": [1, 2.5, None]}
    write_json(path, {"after": 1})
    assert json.loads(path.read_text()) == {"after": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["eval.json"]


def write_until_killed(path: str) -> None:
    """Be ended by the system in the middle of writing."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    write_json(Path(path), {"long": "x" * 2**17})


def test_an_evaluation_overwrites_only_what_says_the_same_or_less(tmp_path: Path) -> None:
    half = {"base": {"tasks": {"a": {"n": 3, "accuracy": 0.5}}}}
    whole = {**half, "tuned": {"tasks": {"a": {"n": 3, "accuracy": 0.75}}}}
    assert evaluation_file(tmp_path, half) == tmp_path / "eval.json"
    write_json(tmp_path / "eval.json", half)
    rounded = {"base": {"tasks": {"a": {"n": 3, "accuracy": 0.5 + 1e-7}}}}
    other = {"base": {"tasks": {"a": {"n": 4, "accuracy": 0.5}}}}
    assert [evaluation_file(tmp_path, result).name for result in (half, whole, rounded)] == ["eval.json"] * 3
    assert evaluation_file(tmp_path, other).name == "eval-2.json"
    write_json(tmp_path / "eval.json", whole)
    assert evaluation_file(tmp_path, half).name == "eval-2.json"
    (tmp_path / "eval-2.json").write_text("{half")
    assert evaluation_file(tmp_path, other).name == "eval-3.json"
