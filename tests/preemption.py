"""Sessions of a real run on two ranks: started in an instant, signalled from outside, and compared with a whole run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.metrics import Record, read_metrics, without_lost_steps
from tests.e2e import RECIPE, ROOT, SCRIPTS, contents, make_folder
from tests.preemption_workers import read_heard

WORLD = 2
LONGEST = 150
MACHINE = ("tokens_per_second", "step_seconds", "peak_memory_gib")


def make_run_folder(folder: Path) -> Path:
    """Model, data and a recipe in which windows, validations and checkpoints begin and end at different steps."""
    make_folder(folder)
    train = {"max_steps": 12, "logging_steps": 3, "eval_steps": 4, "save_steps": 5, "gradient_checkpointing": False}
    recipe = {**RECIPE, "train": RECIPE["train"] | train, "evaluation": {"batch_tokens": 128}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for(happened: Callable[[], Any], what: str, seconds: float = LONGEST) -> Any:
    """What `happened` gives once that is true. Raises AssertionError if it does not become true."""
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < until, f"{what}: not after {seconds} s"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Session:
    """One start of a run on all ranks; files in `folder` tell how it fares."""

    folder: Path
    name: str

    def ready(self) -> list[int]:
        """Process ids, once all ranks hear signals."""
        wait_for(lambda: len(self._ready()) == WORLD, f"{self.name} hears signals\n{self.log()}")
        return [int(pid) for pid in self._ready()]

    def _ready(self) -> list[str]:
        paths = [self.folder / f"{self.name}.{rank}.ready" for rank in range(WORLD)]
        return [path.read_text() for path in paths if path.exists()]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that is still there."""
        if not self.ended(rank):
            with suppress(ProcessLookupError):
                os.kill(self.ready()[rank], number)

    def ended(self, rank: int) -> bool:
        return (self.folder / f"{self.name}.{rank}.end").exists()

    def wait(self) -> list[int]:
        """Exit codes of all ranks."""
        wait_for(lambda: all(self.ended(rank) for rank in range(WORLD)), f"all ranks of {self.name} end")
        return [int((self.folder / f"{self.name}.{rank}.end").read_text()) for rank in range(WORLD)]

    def log(self) -> str:
        logs = [self.folder / f"{self.name}.{rank}.log" for rank in range(WORLD)]
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs if log.exists())

    def heard(self) -> list[dict[str, Any]]:
        """Every signal that a rank of this session has heard, with the place where it was then."""
        return [record for record in read_heard(self.folder) if record["session"] == self.name]


class Ranks:
    """Processes that have imported everything, of which every session is forked.

    worker: the module that serves them, `tests.preemption_workers` or one like it.
    """

    def __init__(self, folder: Path, worker: str = "tests.preemption_workers") -> None:
        self.folder = folder
        command = [sys.executable, "-m", worker, "serve", str(folder)]
        place = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
                stdin=subprocess.PIPE,
            )
            for rank in map(str, range(WORLD))
        ]

    def start(self, name: str, arguments: Sequence[str], **plants: Any) -> Session:
        """Start a session; see tests.preemption_workers for what can be planted."""
        order = {"name": name, "port": free_port(), "arguments": ["recipe.yaml", *arguments], "plants": plants}
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        return Session(self.folder, name)

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(30)


class Launched(Session):
    """A session under a launcher, which runs `command` and then the session."""

    def __init__(self, command: Sequence[str | Path], folder: Path, name: str, arguments: Sequence[str], **plants: Any):
        super().__init__(folder, name)
        known = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
        path = os.pathsep.join([str(SCRIPTS), known.get("PATH", os.defpath)])
        with (folder / f"{name}.0.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "train", name, json.dumps(plants), "recipe.yaml", *arguments],
                cwd=folder,
                env={**known, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def waits(self) -> None:
        """Return when a rank waits for a signal."""
        wait_for((self.folder / f"{self.name}.waits").exists, f"{self.name} waits\n{self.log()}")

    def end(self) -> int:
        """The launcher's exit code."""
        return self.process.wait(LONGEST)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        """End the launcher and the ranks that it leaves behind."""
        self.process.kill()
        self.process.wait()
        for pid in map(int, self._ready()):
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
    records = without_lost_steps(read_metrics(run / "metrics.jsonl"))
    kept = [record for record in records if record["kind"] in ("train", "eval", "routing")]
    return Result(
        contents(run / "adapter"),
        json.loads((run / "eval.json").read_text()),
        [{key: value for key, value in record.items() if key not in MACHINE} for record in kept],
        (run / "checkpoints" / "best").read_text(),
        (run / "checkpoints" / "latest").read_text(),
    )


def assert_same(run: Path, wanted: Result) -> None:
    found = result(run)
    assert found.records == wanted.records
    assert found.adapter == wanted.adapter
    assert found == wanted


def check_end(session: Session, run: Path) -> dict[str, Any]:
    """What holds of every session that ends by itself: all ranks end alike, and the files agree."""
    codes = session.wait()
    ended = outcome(run)
    wanted = {"finished": 0, "preempted": 75}[ended["outcome"]]
    assert codes == [wanted] * WORLD and ended["exit_code"] == wanted, session.log()
    newest = check_checkpoints(run)
    assert ended["step"] == newest and ended["checkpoint"] == (f"step-{newest:06d}" if newest else None)
    assert leftovers(run) == []
    return ended
