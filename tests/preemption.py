"""Sessions of a real run on two ranks: started in an instant, signalled from outside, and compared with a whole run."""

import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.tracking.metrics import Record, read_metrics
from tests.e2e import RECIPE, ROOT, SCRIPTS, contents, make_folder
from tests.patience import IDLE_SECONDS, Patience
from tests.preemption_workers import entered, read_heard
from tests.processes import start_ranks, wait

WORLD = 2
MACHINE = ("tokens_per_second", "step_seconds", "peak_memory_gib")


def make_run_folder(folder: Path) -> Path:
    """Model, data and a recipe in which windows, validations and checkpoints begin and end at different steps."""
    make_folder(folder)
    train = {"max_steps": 12, "logging_steps": 3, "eval_steps": 4, "save_steps": 5, "gradient_checkpointing": False}
    recipe = {**RECIPE, "train": RECIPE["train"] | train, "evaluation": {"batch_tokens": 128}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def wait_for(happened: Callable[[], Any], what: str, is_over: Callable[[], bool]) -> Any:
    """Return what `happened` gives once that is true. Raises AssertionError once `is_over`."""
    while True:
        # Asked first: what happened before the end counts.
        over = is_over()
        if found := happened():
            return found
        assert not over, f"{what}: not yet, and nothing moves"
        time.sleep(0.02)


class Session(ABC):
    """One start of a run on all ranks; files in `folder` tell how it fares.

    It is given up when its processes have ended, or done nothing for `seconds`.
    """

    def __init__(self, folder: Path, name: str, seconds: float = IDLE_SECONDS) -> None:
        self.folder, self.name, self.seconds = folder, name, seconds

    @abstractmethod
    def alive(self) -> list[int]:
        """Return the ids of the processes that have been started and not ended; they may have children."""

    def wait_for(self, happened: Callable[[], Any], what: str) -> None:
        """Return once it has happened."""
        patience = Patience(self.alive(), self.seconds)
        try:
            wait_for(happened, what, lambda: not self.alive() or patience.is_over())
        except AssertionError as error:
            raise AssertionError(f"{self.name} {error}\n{self.log()}") from None

    def ready(self) -> list[int]:
        """Process ids, once all ranks hear signals."""
        self.wait_for(lambda: len(self.written()) == WORLD, "hears signals")
        return self.written()

    def written(self) -> list[int]:
        """Process ids of the ranks that hear signals already."""
        paths = [self.folder / f"{self.name}.{rank}.ready" for rank in range(WORLD)]
        return [int(path.read_text()) for path in paths if path.exists()]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        with suppress(ProcessLookupError):
            os.kill(self.ready()[rank], number)

    def log(self) -> str:
        logs = [self.folder / f"{self.name}.{rank}.log" for rank in range(WORLD)]
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs if log.exists())

    def heard(self) -> list[dict[str, Any]]:
        """Every signal that a rank of this session has heard, with the place where it was then."""
        return [record for record in read_heard(self.folder) if record["session"] == self.name]


class Started(Session):
    """A session without a launcher."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str], plants: dict[str, Any]) -> None:
        logs = [folder / f"{name}.{rank}.log" for rank in range(WORLD)]
        work = [name, plants, ["recipe.yaml", *arguments]]
        self.processes = start_ranks("tests.preemption_workers:train", work, logs, folder=folder)
        super().__init__(folder, name)

    def alive(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None and process.is_alive()]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that is still there."""
        if self.processes[rank].is_alive():
            super().signal(rank, number)

    def come_to(self, rank: int, phase: str, times: int) -> None:
        """Return once a rank has entered a phase so many times, or has ended."""
        self.ready()
        process = self.processes[rank]
        self.wait_for(
            lambda: self.entered(rank).count(phase) >= times or not process.is_alive(), f"rank {rank} comes to {phase}"
        )

    def entered(self, rank: int) -> list[str]:
        """Every phase that a rank has entered, in their order."""
        return entered(self.folder, self.name, rank)

    def wait(self) -> list[int | str]:
        """Exit codes of all ranks."""
        return wait(self.processes)


class Ranks:
    """Starts sessions without a launcher in one folder, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[BaseProcess] = []

    def start(self, name: str, arguments: Sequence[str], **plants: Any) -> Started:
        """Start a session; see tests.preemption_workers for what can be planted."""
        session = Started(self.folder, name, arguments, plants)
        self.processes += session.processes
        return session

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


class Launched(Session):
    """A session under a launcher, which runs `command` and then the session."""

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        name: str,
        arguments: Sequence[str],
        seconds: float = IDLE_SECONDS,
        **plants: Any,
    ) -> None:
        super().__init__(folder, name, seconds)
        known = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
        path = os.pathsep.join([str(SCRIPTS), known.get("PATH", os.defpath)])
        with (folder / f"{name}.0.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, name, json.dumps(plants), "recipe.yaml", *arguments],
                cwd=folder,
                env={**known, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def alive(self) -> list[int]:
        return [self.process.pid] if self.process.poll() is None else []

    def waits(self) -> None:
        """Return when a rank waits for a signal."""
        self.wait_for((self.folder / f"{self.name}.waits").exists, "waits")

    def end(self) -> int:
        """The launcher's exit code."""
        self.wait_for(lambda: self.process.poll() is not None, "ends")
        return self.process.wait()

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        """End the launcher and the ranks that it leaves behind."""
        self.process.kill()
        self.process.wait()
        for pid in self.written():
            # A rank in another container has written a number that is not ours to kill here.
            with suppress(OSError):
                if self.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)


def parent_of(process: int) -> int:
    """The id of the process that started another one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return found


def check_checkpoints(run: Path) -> int:
    """Verify every finished checkpoint and what the pointers say; the newest one's step, 0 without one."""
    store = CheckpointStore(run / "checkpoints")
    for step in store.steps():
        Checkpoint.open(store.folder / f"step-{step:06d}").verify()
    newest = store.latest()
    if newest is None:
        return 0
    assert (store.folder / "latest").read_text() in {f"step-{step:06d}\n" for step in store.steps()}
    return store.steps()[-1]


def leftovers(run: Path) -> list[str]:
    """What a session has begun and not finished."""
    return [str(path) for path in run.rglob("*.partial")]


@dataclass(frozen=True)
class Result:
    """All that a run gives and that its stops must not change, to the last bit."""

    adapter: dict[str, bytes]
    evaluations: Any
    records: list[Record]
    best: str
    latest: str


def result(run: Path) -> Result:
    # As they stand in the file: what was done twice is there once.
    records = read_metrics(run / "metrics.jsonl")
    saved = {record["step"] for record in records if record["kind"] == "checkpoint"}
    assert set(CheckpointStore(run / "checkpoints").steps()) <= saved, "each checkpoint has its record"
    kept = [record for record in records if record["kind"] in ("train", "eval", "routing")]
    return Result(
        contents(run / "adapter"),
        json.loads((run / "eval.json").read_text()),
        [{key: value for key, value in record.items() if key not in MACHINE} for record in kept],
        (run / "checkpoints" / "best").read_text(),
        (run / "checkpoints" / "latest").read_text(),
    )


def whole_run(ranks: Ranks, name: str, arguments: Sequence[str] = ()) -> tuple[Result, list[str]]:
    """What a run gives that is never stopped, and the phases that it enters."""
    session = ranks.start(name, [*arguments, "--output_dir", f"runs/{name}"])
    assert session.wait() == [0] * WORLD, session.log()
    return result(ranks.folder / "runs" / name), session.entered(0)


def assert_same(run: Path, wanted: Result) -> None:
    found = result(run)
    assert found.records == wanted.records
    assert found.adapter == wanted.adapter
    assert found == wanted


def check_end(session: Started, run: Path) -> dict[str, Any]:
    """What holds of every session that ends by itself: all ranks end alike, and the files agree."""
    codes = session.wait()
    ended = outcome(run)
    wanted = {"finished": 0, "preempted": 75}[ended["outcome"]]
    assert codes == [wanted] * WORLD and ended["exit_code"] == wanted, session.log()
    newest = check_checkpoints(run)
    assert ended["step"] == newest and ended["checkpoint"] == (f"step-{newest:06d}" if newest else None)
    assert leftovers(run) == []
    return ended
