"""The queue with processes that train nothing, and once for real with a tiny model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from malora_dist.bench.quality import queue as queue_module
from malora_dist.bench.quality.queue import PAUSE, Queue
from malora_dist.bench.quality.results import Result, read_results
from malora_dist.bench.quality.runs import Bench
from malora_dist.bench.quality.schedule import planned
from malora_dist.bench.quality.tables import markdown
from malora_dist.errors import ConfigError
from malora_dist.files.exit_status import EXIT_PREEMPTED
from malora_dist.files.locks import lock_at
from tests.bench.quality.suites import TINY, result, tiny_bench
from tests.patience import Patience
from tests.processes import ROOT, start


class Ended:
    """A process that has ended with this exit code."""

    pid = 2**22 + 1

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "POLL_SECONDS", 0.01)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return tiny_bench(tmp_path)


def finishing(bench: Bench, codes: dict[str, int] | None = None):  # type: ignore[no-untyped-def]
    """Starts nothing, but writes what a run with a mean accuracy of 0.5 would."""

    def begin(recipe: Path, log: Path, threads: int) -> Ended:
        run = next(run for run in planned(bench, read_results(bench.out)) if run.id == recipe.parent.name)
        code = next((code for name, code in (codes or {}).items() if name in run.id), 0)
        folder = recipe.parent / "run"
        folder.mkdir(exist_ok=True)
        log.write_text("line\nNonFiniteError: the loss is nan\n")
        made = result(run, 0.5).record
        side = "base" if run.method == "base" else "tuned"
        facts = [{"kind": "run", "trainable_parameters": 7}, {"kind": "train", "step": 1, "loss": 1, "step_seconds": 1}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
        (folder / "eval.json").write_text(json.dumps({side: made["result"]}))
        rows = [{"task": task, **row} for task, rows in made["questions"].items() for row in rows]
        (folder / f"scores-{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "checkpoints").mkdir(exist_ok=True)
        return Ended(code)

    return begin


def test_every_run_is_one_result_and_a_second_queue_has_nothing_to_do(bench: Bench) -> None:
    said: list[str] = []
    made = Queue([bench], bench.out, start=finishing(bench), say=said.append).run()
    results = read_results(bench.out)
    assert made == len(results) == len(planned(bench, results)) > 10
    assert all(found.finished and found.average == 0.5 for found in results.values())
    assert not list(bench.out.rglob("checkpoints"))
    assert said[0].startswith("tiny: 0 runs done") and "not measured yet" in said[0]
    assert Queue([bench], bench.out, start=finishing(bench), say=said.append).run() == 0
    text = markdown([bench], results)
    assert "| lora |" in text and "Seesaw of tiny" in text and "minus lora" in text


def test_a_failure_is_a_result_with_its_error_and_the_queue_goes_on(bench: Bench) -> None:
    Queue([bench], bench.out, start=finishing(bench, {"tiny_lora_lr0.002": 1}), say=str).run()
    failed = [found for found in read_results(bench.out).values() if not found.finished]
    assert [found.record["method"] for found in failed] == ["lora"]
    assert failed[0].record["error"] == "exit code 1" and "the loss is nan" in failed[0].record["log"][-1]


def test_limit_pattern_and_jobs(bench: Bench) -> None:
    Queue([bench], bench.out, only="*molora*", start=finishing(bench), say=str).run()
    assert {found.record["method"] for found in read_results(bench.out).values()} == {"molora"}
    assert Queue([bench], bench.out, limit=3, jobs=2, start=finishing(bench), say=str).run() == 3


def test_a_run_that_was_stopped_has_no_result(bench: Bench) -> None:
    queue = Queue([bench], bench.out, limit=1, start=finishing(bench, {"base": EXIT_PREEMPTED}), say=str)
    threading.Timer(0.2, queue._stop).start()
    queue.run()
    assert not read_results(bench.out)


def test_two_queues_never_work_in_one_folder(bench: Bench) -> None:
    (bench.out / "runs").mkdir(parents=True, exist_ok=True)
    with lock_at(bench.out / "queue.lock"), pytest.raises(ConfigError, match="another queue is at work there"):
        Queue([bench], bench.out, start=finishing(bench), say=str).run()


def test_nothing_begins_while_the_pause_file_is_there(bench: Bench) -> None:
    pause = bench.out / PAUSE
    pause.touch()
    queue = Queue([bench], bench.out, limit=1, start=finishing(bench), say=str)
    seen: list[int] = []

    def resume() -> None:
        seen.append(len(read_results(bench.out)))
        pause.unlink()

    threading.Timer(0.3, resume).start()
    assert queue.run() == 1 and seen == [0]


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_run_does_not_outlive_a_queue_that_is_killed() -> None:
    code = (
        "import subprocess, sys, time; from malora_dist.bench.quality.queue import end_with_parent as end\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], preexec_fn=end)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    patience = Patience([child])
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert not patience.is_over()
        time.sleep(0.05)


class Warm:
    """A real run in a process that has imported everything."""

    def __init__(self, recipe: Path, log: Path, threads: int) -> None:
        self.process = start("tests.e2e:do", ("malora_dist.train", [str(recipe)]), log)
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


@pytest.mark.e2e
def test_a_suite_of_a_tiny_model(tmp_path: Path) -> None:
    """Real runs: the untouched base, one task alone, two methods, and one that fails."""
    wrong = {"name": "diverges", "rates": [1e30], "recipe": {"adapter": {"method": "lora"}}}
    bench = tiny_bench(
        tmp_path, TINY | {"methods": [*TINY["methods"][:3], wrong], "pilot": {"keep": 2}}, real_tokenizer=True
    )
    Queue([bench], bench.out, only="*_s1_*", limit=6, jobs=2, start=Warm, say=str).run()
    results = list(read_results(bench.out).values())
    made = sorted(found.record["method"] for found in results)
    assert made == ["alone", "alone", "base", "diverges", "lora", "molora"]
    for found in results:
        check_result(found, bench)
    assert "Pilot of tiny" in markdown([bench], read_results(bench.out))


def check_result(found: Result, bench: Bench) -> None:
    record = found.record
    if record["method"] == "diverges":
        assert not found.finished and "exit code" in record["error"] and record["log"]
        return
    assert found.finished, record
    assert (
        record["trainable_parameters"] == bench.parameters[record["method"] if record["method"] != "base" else "molora"]
    )
    for task, row in record["result"]["tasks"].items():
        assert len(record["questions"][task]) == row["n"] == 9
        assert found.hits(task).mean() == pytest.approx(row["accuracy"])
    assert record["seconds"]["cpu"] > 0 and record["step_seconds"] > 0


@pytest.mark.e2e
def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """SIGTERM to the queue's process saves the run; the next queue takes the steps that are left."""
    recipe = TINY["recipe"] | {"train": TINY["recipe"]["train"] | {"max_steps": 400}}
    bench = tiny_bench(tmp_path, TINY | {"recipe": recipe}, real_tokenizer=True)
    queue = Queue([bench], bench.out, only="*_molora_*", limit=1, start=Warm, say=str)

    def stop() -> None:
        while not any(path.stat().st_size > 2000 for path in bench.out.rglob("metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert queue.run() == 0 and not read_results(bench.out)
    assert list(bench.out.rglob("checkpoints"))
    assert Queue([bench], bench.out, only="*_molora_*", limit=1, start=Warm, say=str).run() == 1
    (found,) = read_results(bench.out).values()
    assert len(found.record["training_loss"]) == 400
