"""Each checkpoint is whole or absent wherever a process is killed, and only old ones are removed."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from malora_dist.checkpoint.layout import MANIFEST
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.shards import write_shard
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.errors import CheckpointError
from tests.checkpoint.kill_workers import LAYERS, SAVE_TOTAL_LIMIT
from tests.checkpoint.samples import check_tensors, manifest_of, save, tensors_of, write_files
from tests.processes import start


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_save_appears_at_its_commit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert (store.steps(), store.latest(), store.best()) == ([], None, None)
    partial = store.begin(7)
    assert partial == store.folder / ".step-000007.partial" and not list(partial.iterdir())
    manifest = manifest_of(7, *write_files(partial, tensors_of(7), 2))
    assert (store.steps(), store.latest()) == ([], None)
    folder = store.commit(7, manifest)
    assert folder == store.latest() == store.folder / "step-000007"
    assert names(store.folder) == {"step-000007", "latest"}
    assert (store.folder / "latest").read_text() == "step-000007\n"
    check_tensors(folder, tensors_of(7))
    save(store, 1234567)
    assert store.steps() == [7, 1234567]
    assert (store.folder / "latest").read_text() == "step-1234567\n"


def test_a_save_may_be_given_up(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    write_files(store.begin(2), tensors_of(2), 2)
    store.discard(2)
    store.discard(3)
    assert names(tmp_path) == {"step-000001", "latest"}
    save(store, 2)
    assert store.steps() == [1, 2]


def test_leftovers_are_removed_by_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    for name in (".step-000002.partial", ".step-000003.partial", ".step-000000.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".latest.partial").touch()
    outside = tmp_path.with_name("outside")
    outside.mkdir()
    (outside / "file").touch()
    os.symlink(outside, tmp_path / ".step-000009.partial")
    assert store.steps() == [1]
    assert not list(store.begin(2).iterdir())
    assert names(tmp_path) == {"step-000001", "latest", ".step-000002.partial"}
    assert (outside / "file").exists()


def test_nothing_is_overwritten_and_steps_rise(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    before = (tmp_path / "step-000005" / MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="step-000005 exists already"):
        store.begin(5)
    with pytest.raises(CheckpointError, match="step-000004 would be older than step-000005"):
        store.begin(4)
    manifest = manifest_of(6, *write_files(store.begin(6), tensors_of(6), 1))
    (tmp_path / "step-000006").mkdir()  # not a finished checkpoint, but somebody's
    with pytest.raises(CheckpointError, match="step-000006 exists already"):
        store.commit(6, manifest)
    assert (store.steps(), before) == ([5], (tmp_path / "step-000005" / MANIFEST).read_bytes())
    assert (tmp_path / "latest").read_text() == "step-000005\n"


@pytest.mark.parametrize("case", ["missing", "short", "link", "stray", "tensor"])
def test_an_incomplete_save_is_not_committed(tmp_path: Path, case: str) -> None:
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    partial = store.begin(2)
    manifest = manifest_of(2, *write_files(partial, tensors_of(2), 2))
    shard = partial / "optimizer-00002-of-00002.safetensors"
    if case == "missing":
        shard.unlink()
        words = f"{shard} is missing, the manifest lists it; the folder must be on a disk that all nodes share"
    elif case == "short":
        os.truncate(shard, 100)
        words = f"{shard} has 100 bytes, the manifest says {manifest.files[shard.name].bytes}"
    elif case == "link":
        shard.rename(tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", shard)
        words = f"{shard} is a symbolic link"
    elif case == "stray":
        write_shard(partial / "extra.safetensors", {"x": torch.ones(1)})
        words = f"{partial / 'extra.safetensors'} is not in the manifest"
    else:
        adapter = manifest.tensors["adapter"] | {"layer.B": shard.name}
        manifest = replace(manifest, tensors=manifest.tensors | {"adapter": adapter})
        words = f"{shard} holds no layer.B"
    with pytest.raises(CheckpointError) as caught:
        store.commit(2, manifest)
    assert words in str(caught.value)
    store.discard(2)
    assert store.steps() == [1] and (tmp_path / "latest").read_text() == "step-000001\n"
    check_tensors(tmp_path / "step-000001", tensors_of(1))


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, {}, [1, 2, 3, 4, 5]),
        (2, {}, [4, 5]),
        (1, {}, [5]),
        (3, {2: 2}, [2, 4, 5]),
        (2, {2: 1}, [1, 5]),
        (1, {3: 3}, [3, 5]),
        (1, {2: 2, 4: 4}, [4, 5]),
        (9, {1: 1}, [1, 2, 3, 4, 5]),
    ],
)
def test_retention(tmp_path: Path, limit: int | None, best: dict[int, int], kept: list[int]) -> None:
    """`best`: after which step which step becomes the best."""
    store = CheckpointStore(tmp_path, limit)
    small = tensors_of(0, layers=1, width=2)
    for step in range(1, 6):
        save(store, step, small, shards=1)
        if step in best:
            store.mark_best(best[step])
    assert store.steps() == kept
    expected = {f"step-{step:06d}" for step in kept} | {"latest"} | ({"best"} if best else set())
    assert names(tmp_path) == expected
    marked = best.get(max(best, default=0))
    assert store.best() == (tmp_path / f"step-{marked:06d}" if marked else None)
    for step in kept:
        check_tensors(tmp_path / f"step-{step:06d}", small)


def test_best_is_a_finished_checkpoint_and_moves(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.begin(2)
    for step in (2, 3):
        with pytest.raises(CheckpointError, match=f"step-00000{step} is not a finished checkpoint to mark as best"):
            store.mark_best(step)
    assert store.best() is None
    save(store, 4)
    for step in (1, 4):
        store.mark_best(step)
        assert store.best() == tmp_path / f"step-00000{step}"
        assert (tmp_path / "best").read_text() == f"step-00000{step}\n"


@pytest.mark.parametrize("pointer", ["best", "latest"])
@pytest.mark.parametrize(
    "text",
    [
        "../outside\n",
        "/tmp\n",
        "step-000099\n",
        "",
        "\xff\xfe",
        "step-000001/../step-000002",
        ".step-000003.partial",
        "\0",
    ],
)
def test_a_damaged_pointer_is_never_followed(tmp_path: Path, pointer: str, text: str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    outside = tmp_path / "outside"
    for step in (1, 2):
        save(store, step)
    Path.rename(save(CheckpointStore(outside), 3), tmp_path / "x")
    store.mark_best(1)
    write_files(store.begin(3), tensors_of(3), 1)
    (store.folder / pointer).write_bytes(text.encode("latin-1"))
    assert store.latest() == store.folder / "step-000002"
    assert store.best() == (None if pointer == "best" else store.folder / "step-000001")
    save(store, 3)
    assert (store.folder / "latest").read_text() == "step-000003\n"
    assert store.steps() == ([2, 3] if pointer == "best" else [1, 3])
    store.mark_best(3)
    assert store.best() == store.folder / "step-000003"


def test_links_and_odd_folders_are_no_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 1)
    other = save(CheckpointStore(tmp_path / "other"), 9)
    os.symlink(other, store.folder / "step-000009")
    (store.folder / "step-000008").mkdir()
    (store.folder / "step-000007").touch()
    (store.folder / "step-10").mkdir()
    (store.folder / "step-10" / MANIFEST).touch()
    os.symlink(other.parent / "latest", store.folder / "best")
    (other.parent / "latest").write_text("step-000001\n")
    assert store.steps() == [1] and store.best() is None


@pytest.mark.distributed
def test_kills_at_random_moments_of_saves(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    kills = 60 if pytestconfig.getoption("soak") else 30
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, SAVE_TOTAL_LIMIT)
    draw = random.Random(0)
    newest = best = inside = finished = 0
    for number in range(kills):
        finish = draw.choice([0, 1, 2])
        kill_a_save(folder, finish, draw.random(), tmp_path / f"saves{number}", tmp_path / "log")
        inside += any(folder.glob(".step-*.partial")) or any(folder.glob(".step-*.removed"))
        finished += finish
        newest, best = check_after_kill(store, newest, best)
    save(store, newest + 1)
    assert len(store.steps()) <= SAVE_TOTAL_LIMIT and not list(folder.glob(".*"))
    assert newest >= finished and best >= finished / 2 and inside >= kills / 6, (newest, best, finished, inside)


def kill_a_save(folder: Path, finish: int, part: float, saves: Path, log: Path) -> None:
    """Let a process finish so many saves and go on for a part of the time of one, then kill it."""
    process = start("tests.checkpoint.kill_workers:save_forever", [str(folder), str(saves)], log)
    begun = []
    while len(begun) <= finish and process.is_alive():
        time.sleep(0.002)
        if saves.exists() and saves.read_text().count("\n") > len(begun):
            begun.append(time.monotonic())
    # Of the save before, or of one of a usual disk where this is the first.
    duration = begun[-1] - begun[-2] if len(begun) > 1 else 0.2
    time.sleep(part * duration)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def check_after_kill(store: CheckpointStore, newest: int, best: int) -> tuple[int, int]:
    """Everything finished is undamaged; the steps of the newest and the best, which never fall."""
    steps = store.steps()
    for step in steps:
        checkpoint = Checkpoint.open(store.folder / f"step-{step:06d}")
        checkpoint.verify()
        name = f"model.layers.{LAYERS - 1}.mlp.up_proj.gate"
        assert checkpoint.read_elements("adapter", name, 0, 1).item() == step + 100 * (LAYERS - 1)
    latest, marked = store.latest(), store.best()
    if latest is not None:
        assert latest.name == f"step-{steps[-1]:06d}"
    if marked is not None:
        assert int(marked.name.removeprefix("step-")) in steps
    found = steps[-1] if steps else 0, int(marked.name.removeprefix("step-")) if marked else 0
    assert found[0] >= newest and found[1] >= best and found[1] % 3 == 0
    return found
