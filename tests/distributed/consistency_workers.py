"""What four real processes find out about what they have alike, all in one launch."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from malora_dist.distributed.consistency import check_consistency, check_shared_folder
from malora_dist.distributed.process_groups import World, wait_for_all
from malora_dist.errors import MaloraError
from tests.multiprocess import run_distributed

BLOCKS = ["node1", "node1", "node2", "node2"]
FACTS = {"torch": "2.13.0", "deepspeed": "0.19.8"}


@cache
def results() -> list[dict[str, Any]]:
    """What `find_out` returned on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        return run_distributed("tests.distributed.consistency_workers:find_out", 4, folder=folder)


def find_out(world: World, folder: str) -> dict[str, Any]:
    own = {"torch": f"2.{12 + world.rank // 2}.0"}
    uneven = "node1" if world.rank < 3 else "node2"
    found = {
        "alike": said(lambda: check_consistency(world, FACTS, BLOCKS[world.rank])),
        "host": said(lambda: len(set(check_consistency(world, FACTS)))),
        "nodes differ": said(lambda: check_consistency(world, {**FACTS, **own}, BLOCKS[world.rank])),
        "ranks differ": said(lambda: check_consistency(world, {"x": str(world.rank % 2)}, BLOCKS[world.rank])),
        "one lacks": said(lambda: check_consistency(world, {"x": "1"} if world.rank else {}, f"n{world.rank}")),
        "uneven": said(lambda: check_consistency(world, FACTS, uneven)),
        "both": said(lambda: check_consistency(world, own, uneven)),
    }
    return found | {f"folder {name}": value for name, value in folders(world, Path(folder)).items()}


def folders(world: World, folder: Path) -> dict[str, Any]:
    """A machine without the shared folder is one that works in another folder, and names it from there."""
    home = Path.cwd()
    if world.is_main:
        (folder / "file").write_text("")
        (folder / "own" / "runs").mkdir(parents=True)
    found: dict[str, Any] = {
        "shared": said(lambda: check_shared_folder(world, folder / "runs" / "one", BLOCKS)),
        "run is there": said(lambda: check_shared_folder(world, folder / "own", BLOCKS)),
        "is a file": said(lambda: check_shared_folder(world, folder / "file", BLOCKS)),
        "not writable": said(lambda: check_shared_folder(world, Path("/proc/runs/one"), BLOCKS)),
        "one node": said(lambda: check_shared_folder(world, Path("/proc/runs/one"), ["node1"] * 4)),
    }
    with contextlib.ExitStack() as back:
        back.callback(os.chdir, home)
        os.chdir(folder / "own" if world.rank < 2 else folder)
        started = time.monotonic()
        found["other"] = said(lambda: check_shared_folder(world, Path("runs/one"), BLOCKS, seconds=1))
        found["seconds"] = time.monotonic() - started
    # The main process takes its probe away last.
    wait_for_all()
    found["left"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return found


def said(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except MaloraError as error:
        return [type(error).__name__, str(error)]
