"""A rank that lives through sessions of real runs, each a fork of its own, and what is planted in one of them.

`python -m tests.preemption_workers serve FOLDER` imports once and then reads orders, one JSON object a line, from
stdin: `name`, `port`, `arguments` of malora_dist.train, `plants`. Each becomes a child, whose readiness for signals,
output and exit code are left in files of the folder. Under a launcher, `... train NAME PLANTS ARGUMENTS` is a session.

Plants: `traps`, a list of objects with `rank` and the place where something happens to that rank: `on` an entered
"phase", a "check" of the agreement, a "look" while tokenising, or the "call" of a function of malora_dist.train; `at`
the name of it, with `step` and `count` (from 0) where it comes more than once. What happens is a `signal` from the
process to itself, a `sleep` of seconds, or a `wait` until any rank has heard a signal from outside. `write_seconds`:
what the first shard of each rank takes to write; `while_writing`: the signals that come meanwhile. `leave_seconds`:
what leaving the process groups takes, after a signal.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import malora_dist.engine.checkpoints
import malora_dist.engine.process
import malora_dist.engine.saver
import malora_dist.parallel.groups
import malora_dist.train
from malora_dist.engine.position import Position
from malora_dist.engine.stop import Agreement

Work = Callable[[str, dict[str, Any], list[str]], int]

RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
SHARD_BYTES = 20_000  # so that both ranks write
HEARD = "heard.jsonl"
LONGEST = 100
# What a run imports on its way: a session is to spend its time on what is tested.
EARLY = (
    "deepspeed",
    "matplotlib.figure",
    "matplotlib.patches",
    "matplotlib.ticker",
    "peft",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


class Planted:
    """The traps that wait in this rank, and where it is."""

    def __init__(self, name: str, plants: dict[str, Any]) -> None:
        self.name = name
        self.traps = [trap for trap in plants.get("traps", ()) if trap["rank"] == RANK]
        self.position = Position(RANK)
        self.passed: Counter[tuple[str, str, int]] = Counter()
        self.told = threading.Event()

    def reach(self, kind: str, name: str) -> None:
        place = (kind, name, self.position.step)
        for trap in self.traps:
            wanted = (trap["on"], trap["at"], trap.get("step", self.position.step))
            if wanted == place and trap.get("count", 0) == self.passed[place]:
                self._spring(trap)
        self.passed[place] += 1

    def _spring(self, trap: dict[str, Any]) -> None:
        if "signal" in trap:
            os.kill(os.getpid(), getattr(signal, trap["signal"]))
            assert self.told.wait(LONGEST)
        time.sleep(trap.get("sleep", 0))
        if "wait" in trap:
            leave(Path(f"{self.name}.waits"), str(os.getpid()))
            until = time.monotonic() + LONGEST
            while time.monotonic() < until and not any(here["session"] == self.name for here in read_heard(Path())):
                time.sleep(0.02)

    def hear(self, code: int) -> None:
        here = {"session": self.name, "rank": RANK, "code": code, "phase": self.position.phase}
        append(Path(HEARD), here | {"step": self.position.step})
        self.told.set()


def read_heard(folder: Path) -> list[dict[str, Any]]:
    """Every signal that a rank of any session in this folder has heard, with the place where the rank was then."""
    path = folder / HEARD
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(name: str, plants: dict[str, Any], arguments: list[str]) -> int:
    """malora_dist.train with everything planted."""
    planted = Planted(name, plants)

    class TellingPosition(Position):
        def __init__(self, rank: int) -> None:
            super().__init__(rank)
            planted.position = self

        def enter(self, phase: str, step: int | None = None) -> None:
            super().enter(phase, step)
            planted.reach("phase", phase)

    class TellingAgreement(Agreement):
        def request(self, code: int) -> None:
            super().request(code)
            planted.hear(code)

        def check(self) -> None:
            planted.reach("check", str(planted.position.phase))
            super().check()

        def _look(self) -> None:
            planted.reach("look", "tokenising")
            super()._look()

    module: Any = malora_dist.train
    module.Position, module.Agreement = TellingPosition, TellingAgreement
    module.watched = partial(_ready, name, module.watched)
    for called in {trap["at"] for trap in planted.traps if trap["on"] == "call"}:
        setattr(module, called, _after(partial(planted.reach, "call", called), getattr(module, called)))
    checkpoints: Any = malora_dist.engine.checkpoints
    checkpoints.Saver = partial(checkpoints.Saver, shard_bytes=SHARD_BYTES)
    if "write_seconds" in plants:
        saver: Any = malora_dist.engine.saver
        saver.write_shard = _after(partial(_write_slowly, plants), saver.write_shard)
    if "leave_seconds" in plants:
        groups: Any = malora_dist.parallel.groups
        groups.stop_processes = _after(partial(_leave_slowly, plants["leave_seconds"]), groups.stop_processes)
    process: Any = malora_dist.engine.process
    process.PATIENCE_SECONDS = 1
    return module.main(arguments)  # type: ignore[no-any-return]


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first()
        return then(*arguments, **named)

    return both


def _write_slowly(plants: dict[str, Any]) -> None:
    """What write_shard does before it writes, in a thread: the first signal comes at once, while training goes on."""
    seconds, signals = plants.pop("write_seconds", [0] * (RANK + 1))[RANK], plants.get("while_writing", [])
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
        leave(Path(f"{name}.{RANK}.ready"), str(os.getpid()))
        yield


def append(path: Path, record: dict[str, Any]) -> None:
    """One line, whole whoever else writes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (json.dumps(record) + "\n").encode())
    os.close(descriptor)


def leave(path: Path, text: str) -> None:
    """A file that is there only once its text is."""
    partial_path = path.with_name(f"{path.name}.new")
    partial_path.write_text(text)
    partial_path.rename(path)


def start(order: dict[str, Any], work: Work) -> int:
    """The id of the process of this rank in a session; its output goes to `<name>.<rank>.log`."""
    child = os.fork()
    if child == 0:
        log = os.open(f"{order['name']}.{RANK}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["MASTER_PORT"] = str(order["port"])
        code = 1
        try:
            code = work(order["name"], order["plants"], order["arguments"])
        finally:
            os._exit(code)
    return child


def serve(work: Work = train) -> None:
    """Start what is ordered, report what has ended; end everything when there is no one left to order."""
    for module in EARLY:
        import_module(module)
    children: dict[int, str] = {}
    waiting = b""
    leave(Path(f"zygote.{RANK}.ready"), str(os.getpid()))
    while True:
        if select.select([0], [], [], 0.02)[0]:
            received = os.read(0, 65536)
            if not received:
                break
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                order = json.loads(line)
                children[start(order, work)] = order["name"]
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                leave(Path(f"{children.pop(child)}.{RANK}.end"), str(os.waitstatus_to_exitcode(status)))
    for child in children:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if words[0] == "serve":
        os.chdir(words[1])
        serve()
    else:
        sys.exit(train(words[1], json.loads(words[2]), words[3:]))
