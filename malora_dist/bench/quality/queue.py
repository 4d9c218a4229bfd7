"""Runs one after another in the background: at the lowest priority, resumable, with a file that pauses it."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from filelock import BaseFileLock, Timeout

from malora_dist.bench.quality.cost import cost_lines
from malora_dist.bench.quality.results import FAILED, FINISHED, Result, facts_of, outcome_of, read_results
from malora_dist.bench.quality.runs import Bench, Run
from malora_dist.bench.quality.schedule import STAGES, foreseen, planned
from malora_dist.config import config_text
from malora_dist.errors import ConfigError
from malora_dist.files.atomic import write_json, write_text
from malora_dist.files.exit_status import EXIT_PREEMPTED
from malora_dist.files.locks import lock_at

PAUSE, LOCK, RECIPE, LOG = "pause", "queue.lock", "recipe.yaml", "log.txt"
POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
LAST_LINES = 15
# What a finished run no longer needs: weights and optimizer states of hundreds of runs would fill a disk.
REMOVED = ("checkpoints", "adapter", "report")

Say = Callable[[str], None]


class Process(Protocol):
    """What the queue needs of a process (`subprocess.Popen`)."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit code once it has ended."""


# Starts the training of a recipe, with its log and number of threads.
Start = Callable[[Path, Path, int], Process]


def start_training(recipe: Path, log: Path, threads: int) -> Process:
    """Start `python -m malora_dist.train RECIPE`, with both streams appended to the log."""
    # A thread that waits for another one must not burn the time that the other one needs.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "malora_dist.train", str(recipe)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )


def end_with_parent() -> None:
    """Let the system kill this process when its parent has ended, so that no run is left without a queue.

    It is killed, not asked to end, since a stopped run would not react to a request. Only Linux can do this.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lowest_priority() -> None:
    """Let this process and its children run only when nothing else needs the processor, where the system can."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@dataclass
class Active:
    """A run that is being made in `folder`. paused: seconds in which it stood still. cpu: seconds of processors."""

    run: Run
    folder: Path
    process: Process
    began: float
    paused: float = 0.0
    cpu: float = 0.0

    def signal(self, number: int) -> None:
        """Send a signal to its process, unless that has ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def ended(self) -> int | None:
        """Return its exit code once it has ended."""
        with contextlib.suppress(OSError, ValueError):
            spent = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            self.cpu = (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")
        return self.process.poll()


@dataclass
class Queue:
    """The runs of some suites.

    Attributes:
        benches: the suites, prepared.
        out: folder of the measurement.
        only: a run is made only if its id matches this pattern of a shell.
        final: make the final runs too.
        limit: runs to make at most.
        jobs: runs at the same time.
        start: starts a run.
        say: gets a line about everything that happens.
    """

    benches: Sequence[Bench]
    out: Path
    only: str = "*"
    final: bool = False
    limit: int | None = None
    jobs: int = 1
    start: Start = start_training
    say: Say = print
    _active: list[Active] = field(default_factory=list)
    _stopped: bool = False

    def run(self) -> int:
        """Make all runs that are left; return how many were made. Raises ConfigError if another queue is at work."""
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._tell_cost()
            before = signal.signal(signal.SIGTERM, self._stop)
            try:
                return self._work()
            finally:
                signal.signal(signal.SIGTERM, before)

    def known(self, results: Mapping[str, Result]) -> list[Run]:
        """Return all runs that are known to be needed, those of the suites in turns, the most telling stage first."""
        stages: dict[str, list[list[Run]]] = {stage: [] for stage in STAGES}
        for bench in self.benches:
            runs = planned(bench, results, final=self.final)
            for stage in STAGES:
                stages[stage].append([run for run in runs if run.stage == stage and fnmatch(run.id, self.only)])
        return [run for lists in stages.values() for run in _in_turns(lists)]

    def foreseen(self, results: Mapping[str, Result]) -> list[Run]:
        """Return the known runs and those that will follow from their results, extensions apart."""
        runs = {run.id: run for run in self.known(results)}
        for bench in self.benches:
            for run in foreseen(bench, results):
                if fnmatch(run.id, self.only):
                    runs.setdefault(run.id, run)
        return list(runs.values())

    def _locked(self) -> BaseFileLock:
        lock = lock_at(self.out / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"--out {self.out}: another queue is at work there") from error
        return lock

    def _stop(self, *_: Any) -> None:
        self._stopped = True

    def _work(self) -> int:
        """Keep `jobs` runs going until none is left, the limit is reached or the queue is asked to stop."""
        made, asked, fresh = 0, False, True
        while True:
            self._pause()
            ended = self._collect()
            made += ended
            fresh |= ended > 0
            if self._stopped and not asked:
                # Each run saves a checkpoint and ends; the next queue goes on from there.
                for active in self._active:
                    active.signal(signal.SIGTERM)
                asked = True
            room = 0 if self._stopped else self.jobs - len(self._active)
            if self.limit is not None:
                room = min(room, self.limit - made - len(self._active))
            # What is to be made next changes only with a result.
            for run in self._next(room) if fresh else ():
                self._begin(run)
            fresh = False
            if not self._active:
                return made
            time.sleep(POLL_SECONDS)

    def _next(self, room: int) -> list[Run]:
        if room < 1:
            return []
        results, busy = read_results(self.out), {active.run.id for active in self._active}
        return [run for run in self.known(results) if run.id not in results and run.id not in busy][:room]

    def _begin(self, run: Run) -> None:
        """Start one run in a process of its own, or resume it where the last queue stopped it."""
        bench = next(bench for bench in self.benches if bench.suite.name == run.suite)
        folder = self.out.absolute() / "work" / run.id
        folder.mkdir(parents=True, exist_ok=True)
        # The recipe lies beside the run's folder, which a run claims for itself.
        write_text(folder / RECIPE, config_text(bench.config(run, folder / "run")))
        process = self.start(folder / RECIPE, folder / LOG, bench.suite.threads)
        self._active.append(Active(run, folder, process, time.time()))
        self.say(f"{time.strftime('%H:%M:%S')} begins: {run.id} ({run.stage})")

    def _collect(self) -> int:
        """Write the results of the runs that have ended; return how many there are."""
        ended = [(active, code) for active in self._active if (code := active.ended()) is not None]
        self._active = [active for active in self._active if active not in [one for one, _ in ended]]
        kept = [(active, code) for active, code in ended if code != EXIT_PREEMPTED and not (self._stopped and code)]
        for active, code in kept:
            self._write(active, code)
        if kept and not self._stopped:
            self._tell_cost()
        return len(kept)

    def _write(self, active: Active, code: int) -> None:
        """Write the result of a run, whatever it is, and remove what is no longer needed."""
        record = facts_of(active.run) | _outcome(active.run, active.folder, code)
        seconds = {"wall": time.time() - active.began - active.paused, "cpu": active.cpu, "paused": active.paused}
        record |= {"seconds": seconds, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(self.out / "runs" / f"{active.run.id}.json", record)
        for name in REMOVED:
            shutil.rmtree(active.folder / "run" / name, ignore_errors=True)
        self.say(f"{time.strftime('%H:%M:%S')} {_line(active.run, record)}")

    def _tell_cost(self) -> None:
        results = read_results(self.out)
        for line in cost_lines(self.foreseen(results), results, self.jobs):
            self.say(line)

    def _pause(self) -> None:
        """Wait until OUT/pause does not exist; until then all runs are stopped."""
        if not (self.out / PAUSE).exists() or self._stopped:
            return
        began = time.time()
        self.say(f"{time.strftime('%H:%M:%S')} paused by {self.out / PAUSE}")
        for active in self._active:
            active.signal(signal.SIGSTOP)
        while (self.out / PAUSE).exists() and not self._stopped:
            time.sleep(POLL_SECONDS)
        for active in self._active:
            active.signal(signal.SIGCONT)
            active.paused += time.time() - began
        self.say(f"{time.strftime('%H:%M:%S')} goes on")


def _in_turns(lists: Sequence[Sequence[Run]]) -> list[Run]:
    longest = max(map(len, lists), default=0)
    return [runs[n] for n in range(longest) for runs in lists if n < len(runs)]


def _outcome(run: Run, folder: Path, code: int) -> dict[str, Any]:
    """Return the status of a run that has ended, with what it measured or its error."""
    if code == 0:
        try:
            return {"status": FINISHED, **outcome_of(run, folder / "run")}
        except (OSError, ValueError, KeyError, StopIteration) as error:
            return {"status": FAILED, "error": f"its files are not those of a finished run: {error!r}"}
    log = folder / LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return {"status": FAILED, "error": f"exit code {code}", "log": text.splitlines()[-LAST_LINES:]}


def _line(run: Run, record: dict[str, Any]) -> str:
    seconds = f"{record['seconds']['wall']:.0f} s, {record['seconds']['cpu']:.0f} s of processors"
    if record["status"] == FAILED:
        return f"FAILED: {run.id}: {record['error']} ({seconds})"
    return f"done: {run.id}: accuracy {record['result']['average']:.4f} ({seconds})"
