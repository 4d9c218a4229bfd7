"""Checkpoints of an engine on two processes: written behind, never two at once, and whole or not at all."""

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.distributed.process_groups import World
from malora_dist.errors import CheckpointError
from malora_dist.training import checkpoint_saver as saver_module
from tests.multiprocess import run_distributed
from tests.resume_workers import Run
from tests.training.workers import make_model

pytestmark = pytest.mark.distributed

SLOW = 1.5
CASE = {"zero_stage": 3, "ep_size": 2, "load_in_4bit": True}
SHARD_BYTES = 20_000


class Slow:
    """write_shard on a slow disk."""

    def __init__(self) -> None:
        self.write, self.writing, self.together = saver_module.write_shard, 0, 0

    def __call__(self, path: Path, tensors: Any) -> Any:
        self.writing += 1
        self.together = max(self.together, self.writing)
        time.sleep(SLOW)
        try:
            return self.write(path, tensors)
        finally:
            self.writing -= 1


def save_in_all_ways(world: World, folder: str, output: str) -> dict[str, Any]:
    run = Run(world, folder, CASE)
    run.train(1)
    found: dict[str, Any] = {}
    slow = Slow()
    saver_module.write_shard = slow  # type: ignore[assignment]

    saver, records = run.saver(f"{output}/behind", asynchronous=True, shard_bytes=SHARD_BYTES)
    first = run.whole_state()
    saver.save(1, run.json_state(), {})
    found["busy"] = saver.progress()
    run.train(2)  # what is written is the state of step 1
    found["listed"] = CheckpointStore(Path(output, "behind")).steps()
    saver.save(2, run.json_state(), run.state.random, best=True)  # waits for the first
    found["listed_then"] = CheckpointStore(Path(output, "behind")).steps()
    saver.complete()
    found["done"] = saver.progress()
    found["records"], found["together"] = records, slow.together
    stored = Checkpoint.open(Path(output, "behind", "step-000001"))
    found["first"] = all(torch.equal(stored.read(*key.split(".", 1)), tensor) for key, tensor in first.items())
    saver.save(2, run.json_state(), {})  # is there
    found["again"] = saver.progress()

    saver_module.write_shard = slow.write
    saver, _ = run.saver(f"{output}/full", asynchronous=True, shard_bytes=SHARD_BYTES)
    saver.save(1, run.json_state(), {})
    saver.complete()
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    saver.save(2, run.json_state(), {})
    try:
        saver.complete()
    except CheckpointError as error:
        found["full"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found["after"] = sorted(path.name for path in Path(output, "full").iterdir())
    saver.save(3, run.json_state(), {})
    saver.complete()

    run.train_step.engine.optimizer.fp32_partitioned_groups_flat[0].data.fill_(float("nan"))
    saver.save(4, run.json_state(), {})
    try:
        saver.complete()
    except CheckpointError as error:
        found["nan"] = str(error)
    found["end"] = CheckpointStore(Path(output, "full")).steps()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saver")
    make_model(folder / "model")
    arguments = {"folder": str(folder / "model"), "output": str(folder)}
    return folder, run_distributed("tests.training.test_checkpoint_saver:save_in_all_ways", 2, **arguments)


def test_a_save_is_written_behind_and_never_two_at_once(found: tuple[Path, list[dict[str, Any]]]) -> None:
    for one in found[1]:
        # Two slow files a process are still being written when `save` is back.
        assert one["busy"] == [True, False] and one["done"] == [False, False]
        assert one["listed"] == [] and one["listed_then"] == [1] and one["again"] == [False, False]
        assert one["together"] == 1 and one["first"]
        first, second = one["records"]
        assert (first["step"], second["step"]) == (1, 2) and first["bytes"] > 2 * SHARD_BYTES
        for record in (first, second):
            assert record["stall_seconds"] <= record["seconds"] and record["seconds"] >= 2 * SLOW
    store = CheckpointStore(found[0] / "behind")
    assert store.steps() == [1, 2] and store.best() == found[0] / "behind" / "step-000002"
    Checkpoint.open(found[0] / "behind" / "step-000002").verify()


def test_a_disk_that_is_full_for_one_process_is_an_error_on_all(found: tuple[Path, list[dict[str, Any]]]) -> None:
    said = {one["full"] for one in found[1]}
    assert len(said) == 1 and "00002-of-00002.safetensors cannot be written: File too large" in said.pop()
    # Nothing half written stays, what was there does, and the next save is whole.
    assert set(found[1][0]["after"]) == {"latest", "step-000001"}
    assert [one["end"] for one in found[1]] == [[1, 3], [1, 3]]
    Checkpoint.open(found[0] / "full" / "step-000003").verify()


def test_what_is_not_finite_is_not_saved(found: tuple[Path, list[dict[str, Any]]]) -> None:
    said = {one["nan"] for one in found[1]}
    assert len(said) == 1 and "elements that are NaN or infinite" in said.pop()
