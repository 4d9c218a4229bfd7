"""One rank of a session of a real run, and what is planted in it.

`tests.processes` calls `train`; under a launcher, `python -m tests.preemption_workers NAME PLANTS ARGUMENTS` is one.
Files in its folder tell when it is ready for signals, which phases it has entered, and which signals it has heard.

Plants: `traps`, a list of objects with `rank` and the place where something happens to that rank: `on` an entered
"phase", a "poll" of all processes, a "poll alone" while tokenising, or the "call" of a function of malora_dist.train;
`at` the name of it, with `step` and `count` (from 0) where it comes more than once. What happens is a `signal` from the
process to itself, a `wait` until any rank has heard a signal from outside, or a `sleep` until the run's time limit is
near, on rank 0, which alone knows it. `write_seconds`: what the first shard of each rank takes to write;
`collective_seconds`: what a collective may take from then on; `while_writing`: the signals that come meanwhile.
`leave_seconds`: what leaving the process groups takes, after a signal.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import malora_dist.distributed.process_groups
import malora_dist.train
import malora_dist.training.checkpoint_saver
import malora_dist.training.checkpoints
import malora_dist.training.process
from malora_dist.training.preemption import PreemptionCoordinator, StopRequest
from malora_dist.training.watchdog import Watchdog

SHARD_BYTES = 20_000  # so that both ranks write
HEARD = "heard.jsonl"
LONGEST = 100


def own_rank() -> int:
    """Return this process's rank, as its launcher says it."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


class Planted:
    """The traps that wait in this rank, and where it is."""

    def __init__(self, name: str, plants: dict[str, Any]) -> None:
        self.name, self.rank = name, own_rank()
        self.traps = [trap for trap in plants.get("traps", ()) if trap["rank"] == self.rank]
        self.watchdog = Watchdog(self.rank)
        self.deadline: float | None = None
        self.passed: Counter[tuple[str, str, int]] = Counter()
        self.told = threading.Event()

    def reach(self, kind: str, name: str) -> None:
        place = (kind, name, self.watchdog.step)
        for trap in self.traps:
            wanted = (trap["on"], trap["at"], trap.get("step", self.watchdog.step))
            if wanted == place and trap.get("count", 0) == self.passed[place]:
                self._spring(trap)
        self.passed[place] += 1

    def _spring(self, trap: dict[str, Any]) -> None:
        if "signal" in trap:
            os.kill(os.getpid(), getattr(signal, trap["signal"]))
            assert self.told.wait(LONGEST)
        if "sleep" in trap:
            assert self.deadline is not None
            time.sleep(max(0, self.deadline - time.time()))
        if "wait" in trap:
            leave(Path(f"{self.name}.waits"), str(os.getpid()))
            until = time.monotonic() + LONGEST
            while time.monotonic() < until and not any(here["session"] == self.name for here in read_heard(Path())):
                time.sleep(0.02)

    def hear(self, code: int) -> None:
        here = {"session": self.name, "rank": self.rank, "code": code, "phase": self.watchdog.phase}
        append(Path(HEARD), here | {"step": self.watchdog.step})
        self.told.set()


def read_heard(folder: Path) -> list[dict[str, Any]]:
    """Every signal that a rank of any session in this folder has heard, with the place where the rank was then."""
    path = folder / HEARD
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(name: str, plants: dict[str, Any], arguments: list[str]) -> int:
    """malora_dist.train with everything planted."""
    planted = Planted(name, plants)

    class TellingWatchdog(Watchdog):
        def __init__(self, rank: int) -> None:
            super().__init__(rank)
            planted.watchdog = self

        def mark_phase(self, phase: str, step: int | None = None) -> None:
            super().mark_phase(phase, step)
            append(Path(f"{name}.{self.rank}.entered"), {"phase": phase.split(" step-")[0]})
            planted.reach("phase", phase)

    class TellingStop(StopRequest):
        def set(self, code: int) -> None:
            super().set(code)
            planted.hear(code)

    class TellingCoordinator(PreemptionCoordinator):
        def poll(self) -> None:
            planted.deadline = self.deadline
            planted.reach("poll", str(planted.watchdog.phase))
            super().poll()

        def _poll_alone(self) -> None:
            planted.reach("poll alone", "tokenising")
            super()._poll_alone()

    module: Any = malora_dist.train
    module.Watchdog, module.StopRequest = TellingWatchdog, TellingStop
    module.PreemptionCoordinator = TellingCoordinator
    module.watched = partial(_ready, name, module.watched)
    for called in {trap["at"] for trap in planted.traps if trap["on"] == "call"}:
        setattr(module, called, _after(partial(planted.reach, "call", called), getattr(module, called)))
    checkpoints: Any = malora_dist.training.checkpoints
    checkpoints.Saver = partial(checkpoints.Saver, shard_bytes=SHARD_BYTES)
    if "write_seconds" in plants:
        saver: Any = malora_dist.training.checkpoint_saver
        saver.write_shard = _after(partial(_write_slowly, plants), saver.write_shard)
    if "leave_seconds" in plants:
        groups: Any = malora_dist.distributed.process_groups
        groups.stop_processes = _after(partial(_leave_slowly, plants["leave_seconds"]), groups.stop_processes)
    process: Any = malora_dist.training.process
    process.PATIENCE_SECONDS = 1
    return module.main(arguments)  # type: ignore[no-any-return]


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first()
        return then(*arguments, **named)

    return both


def _write_slowly(plants: dict[str, Any]) -> None:
    """What write_shard does before it writes, in a thread: the first signal comes at once, while training goes on."""
    rank, signals = own_rank(), plants.get("while_writing", [])
    seconds = plants.pop("write_seconds", [0] * (rank + 1))[rank]
    if seconds and "collective_seconds" in plants:
        malora_dist.distributed.process_groups.set_timeouts(plants["collective_seconds"])
    pauses = [0.1, *[(seconds - 0.1) / len(signals)] * len(signals)] if signals else [seconds]
    for pause in pauses if seconds else []:
        time.sleep(pause)
        if signals:
            os.kill(os.getpid(), getattr(signal, signals.pop(0)))


def _leave_slowly(seconds: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


@contextmanager
def _ready(name: str, watched: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    with watched(*arguments):
        leave(Path(f"{name}.{own_rank()}.ready"), str(os.getpid()))
        yield


def append(path: Path, record: dict[str, Any]) -> None:
    """One line, whole whoever else writes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (json.dumps(record) + "\n").encode())
    os.close(descriptor)


def entered(folder: Path, name: str, rank: int) -> list[str]:
    """Every phase that a rank of a session has entered, in their order."""
    path = folder / f"{name}.{rank}.entered"
    return [json.loads(line)["phase"] for line in path.read_text().splitlines()] if path.exists() else []


def leave(path: Path, text: str) -> None:
    """A file that is there only once its text is."""
    partial_path = path.with_name(f"{path.name}.new")
    partial_path.write_text(text)
    partial_path.rename(path)


if __name__ == "__main__":
    name, plants, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(train(name, json.loads(plants), arguments))
