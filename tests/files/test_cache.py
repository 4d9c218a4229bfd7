"""A folder of the cache is whole or not there, and is never changed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from malora_dist.files.cache import build_once


def test_a_folder_is_built_once_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    assert build_once(folder, lambda partial: (partial / "a").write_text("first") and None) is True
    assert build_once(folder, lambda partial: pytest.fail("built again")) is False
    assert (folder / "a").read_text() == "first"


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "a").write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        build_once(tmp_path / "folder", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.lock"]


def _build(partial: Path) -> None:
    (partial / "pid").write_text(str(os.getpid()))
    time.sleep(0.3)
    (partial / "done").touch()


def _stop_half_way(partial: Path) -> None:
    (partial / "left").touch()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.e2e
def test_of_many_processes_one_builds_also_after_one_was_killed(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    folder = tmp_path / "folder"
    killed = spawn.Process(target=build_once, args=(folder, _stop_half_way))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not folder.exists()
    with spawn.Pool(3) as pool:
        built = pool.starmap(build_once, [(folder, _build)] * 3)
    assert sorted(built) == [False, False, True]
    assert {path.name for path in folder.iterdir()} == {"pid", "done"}
