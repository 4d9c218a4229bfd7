"""What fails on one process is raised on both: mistakes, refusals of the system, and bugs."""

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from malora_dist.config import load_config
from malora_dist.distributed import rank_errors
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.rank_errors import raise_on_all_ranks, run_on_rank0, sharing_errors
from malora_dist.errors import CheckpointError, ConfigError, NonFiniteError, TopologyError
from malora_dist.training.preemption import PreemptionCoordinator
from malora_dist.training.run_context import RunContext
from malora_dist.training.watchdog import Watchdog
from tests.config.recipes import RECIPES
from tests.multiprocess import run_distributed

MISTAKES = (ConfigError("a mistake"), TopologyError("ranks"), CheckpointError("a file"), NonFiniteError("a loss"))
OTHERS = (
    OSError(28, "No space left on device"),
    FileNotFoundError(2, "No such file or directory", "/data/rows.jsonl"),
    PermissionError(13, "Permission denied"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    PackageNotFoundError("nothing"),
    KeyError("a key"),
    ValueError("a value"),
    RuntimeError("of torch"),
    MemoryError(),
    AssertionError("ours"),
)
POLLS = 1200


def found(work: Callable[[], object]) -> list[str]:
    """The kind, the message and the notes of what is raised."""
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error), *getattr(error, "__notes__", ())]
    return []


def fail(error: Exception) -> None:
    raise error


def in_a_block(world: World, error: Exception, failing: tuple[int, ...]) -> None:
    with sharing_errors(world):
        if world.rank in failing:
            raise type(error)(f"{error} of {world.rank}")


def in_the_files_of_one_node(context: RunContext) -> int:
    """Let rank 1 miss a file while the other works on; return how often that one polled."""
    polls = 0
    try:
        with context.while_waiting() as poll:
            if context.world.rank == 1:
                Path("/nowhere/rows.jsonl").read_bytes()
            while polls < (POLLS if context.preemption is not None else 3):
                polls += 1
                time.sleep(0.05)
                poll()
    finally:
        context.watchdog.polls = polls  # type: ignore[attr-defined]
    return polls


def meet_errors(world: World) -> dict[str, Any]:
    results: dict[str, Any] = {"kinds": []}
    for error in (*MISTAKES, *OTHERS):
        main = found(lambda error=error: run_on_rank0(lambda: fail(error), world))  # type: ignore[misc]
        results["kinds"].append(main)
    results["value"] = run_on_rank0(lambda: world.rank, world)
    for ranks in ((0,), (1,), (0, 1)):
        for error in (ConfigError("mistake"), ValueError("bug")):
            results[f"{error} {ranks}"] = found(lambda error=error, ranks=ranks: in_a_block(world, error, ranks))  # type: ignore[misc]
    in_a_block(world, ValueError(), ())
    for preemption in (None, PreemptionCoordinator(world)):
        context = RunContext(load_config(RECIPES / "demo.yaml"), world, Watchdog(world.rank), preemption)
        name = "interrupted" if preemption is not None else "in step"
        results[name] = found(lambda context=context: in_the_files_of_one_node(context))  # type: ignore[misc]
        results[f"{name} polls"] = context.watchdog.polls  # type: ignore[attr-defined]
    return results


@pytest.mark.distributed
def test_what_fails_on_one_rank_is_raised_on_both() -> None:
    first, second = run_distributed("tests.distributed.test_rank_errors:meet_errors", 2)
    assert first["kinds"] == [[type(error).__name__, str(error)] for error in (*MISTAKES, *OTHERS)]
    mistakes = [[type(error).__name__, str(error)] for error in MISTAKES]
    others = [["TrainingError", f"rank 0: {type(error).__name__}: {error}"] for error in OTHERS]
    assert second["kinds"] == [*mistakes, *others]
    assert first["value"] == second["value"] == 0
    for ranks, of in (((0,), 0), ((1,), 1), ((0, 1), 0)):
        for rank, result in enumerate((first, second)):
            origin = [] if rank in ranks else [f"met by rank {of}"]
            assert result[f"mistake {ranks}"] == ["ConfigError", f"mistake of {of}", *origin]
            own = ["ValueError", f"bug of {rank}"]
            assert result[f"bug {ranks}"] == (
                own if rank in ranks else ["TrainingError", f"rank {of}: ValueError: bug of {of}", *origin]
            )
    for way in ("in step", "interrupted"):
        assert second[way][0] == "FileNotFoundError" and "/nowhere/rows.jsonl" in second[way][1]
        assert first[way][:2] == ["TrainingError", f"rank 1: FileNotFoundError: {second[way][1]}"]
    assert first["in step polls"] == 3 and first["interrupted polls"] < POLLS


def test_an_error_is_not_lost_where_the_others_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(rank_errors, "gather_lists", gone)
    monkeypatch.setattr(rank_errors, "this_rank", lambda: 1)
    for error in (ConfigError("a mistake"), OSError("a disk")):
        with pytest.raises(type(error), match="a mistake|a disk"):
            raise_on_all_ranks(error)
    with pytest.raises(RuntimeError, match="closed by peer"):
        raise_on_all_ranks(None)
