"""Real runs in which one rank fails in its second step: several in one launch, or one under a launcher of its own.

`python -m tests.engine.hang_workers FOLDER CASE PORT CASE PORT ...` stands for one rank. It imports once and forks a
child for each case, so what a case does to its process ends with that process, and nothing ends the other ranks.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import malora_dist.engine.setup
import malora_dist.train
from malora_dist.data.loader import MicroBatch, TrainLoader
from malora_dist.engine import process
from malora_dist.engine.position import Position
from malora_dist.nn.siblings import SiblingEntrance

LONGEST = 90
GATE, UP = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))


def sleep_long() -> None:
    time.sleep(3600)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_the_router() -> None:
    def broken(*_: Any) -> None:
        raise ValueError("only this router fails")

    # gate_proj and up_proj are fused.
    SiblingEntrance.forward = broken  # type: ignore[assignment]


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


# What the last rank does in which phase of step 2, at which layer; `save` is the main rank's.
FAULTS: dict[str, tuple[str, str | None, Callable[[], None]]] = {
    "killed": ("backward", UP, kill_itself),
    "router": ("forward", GATE, break_the_router),
    "sleeper": ("forward", UP, sleep_long),
    "save": ("saving step-000002", None, fill_the_disk),
}


class FaultyPosition(Position):
    """The place of a rank, at one of which a fault waits."""

    def __init__(self, rank: int, case: str) -> None:
        super().__init__(rank)
        faulty = 0 if case == "save" else int(os.environ["WORLD_SIZE"]) - 1
        self.where, self.at, self.fault = FAULTS.get(case, ("", None, sleep_long))
        self.where = self.where if rank == faulty else ""

    def enter(self, phase: str, step: int | None = None) -> None:
        super().enter(phase, step)
        self._look()

    def reach(self, layer: str) -> None:
        super().reach(layer)
        self._look()

    def _look(self) -> None:
        if (self.step, self.phase, self.layer) == (2, self.where, self.at):
            self.fault()


class FaultyLoader(TrainLoader):
    """Has no batches on the last rank for step 2, or one too few."""

    case = ""

    def __next__(self) -> list[MicroBatch]:
        first, batches = self._consumed == 0, super().__next__()
        if first or self._rank + 1 < self._world_size or self.case not in ("ended", "short"):
            return batches
        if self.case == "ended":
            raise StopIteration
        return batches[:-1]


def train(case: str, arguments: list[str]) -> int:
    """A run in which the fault waits."""
    FaultyLoader.case = case
    process.PATIENCE_SECONDS = 2
    malora_dist.train.Position = partial(FaultyPosition, case=case)  # type: ignore[assignment, misc]
    malora_dist.engine.setup.TrainLoader = FaultyLoader  # type: ignore[misc]
    return malora_dist.train.main(arguments)


def start(case: str, port: str, folder: Path) -> int:
    """The process id of this rank in a case; its output goes to `<case>.<rank>.log`."""
    child = os.fork()
    if child == 0:
        log = os.open(folder / f"{case}.{os.environ['RANK']}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["MASTER_PORT"] = port
        os._exit(train(case, ["recipe.yaml", "--output_dir", f"runs/{case}"]))
    return child


def wait(case: str, child: int, folder: Path) -> None:
    """Write the exit code to `<case>.<rank>.end`. A child whose fellows have all ended is told to end too."""
    started, rank = time.monotonic(), os.environ["RANK"]
    others = [folder / f"{case}.{other}.end" for other in range(4) if str(other) != rank]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if all(file.exists() for file in others):
            os.kill(child, signal.SIGTERM)
        if time.monotonic() - started > LONGEST:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.2)
    (folder / f"{case}.{rank}.end").write_text(str(os.waitstatus_to_exitcode(ended[1])))


def main(arguments: list[str]) -> None:
    """All cases one after another; the sleeper sleeps meanwhile."""
    folder, sleeper = Path(arguments[0]), None
    for case, port in zip(arguments[1::2], arguments[2::2], strict=True):
        child = start(case, port, folder)
        if case == "sleeper":
            sleeper = child
        else:
            wait(case, child, folder)
    if sleeper is not None:
        wait("sleeper", sleeper, folder)


if __name__ == "__main__":
    if sys.argv[1].startswith("--local_rank"):
        sys.exit(train(sys.argv[2], sys.argv[3:]))
    main(sys.argv[1:])
