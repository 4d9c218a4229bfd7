"""What the end-to-end tests share: a tiny Llama, three small tasks, a recipe, and commands run as a user runs them.

`launch` is the real thing: new interpreters, and the launcher that the command names. `run_alone` and `run_ranks` do
what it would do in processes that have imported everything: for tests of what a run does, not of how it is started.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from malora_dist.errors import DataError
from malora_dist.models.load import load_tokenizer
from malora_dist.models.resolve import resolve_model
from tests.patience import Patience
from tests.ports import free_port
from tests.processes import LAUNCHER, ROOT, start, start_ranks, wait
from tests.tiny_models import save_tiny_llama, smollm2_file

SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """A command that has ended. `output` is what it wrote, both streams in order."""

    code: int
    output: str


def launch(command: Sequence[str | Path], folder: Path, **environment: str) -> Finished:
    """Run a command in `folder` as a user would, one thread a process; end it and its children if they are stuck."""
    known = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    path = os.pathsep.join([str(SCRIPTS), known.get("PATH", os.defpath)])
    known |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=known,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stuck = _wait_for(process)
        log.seek(0)
        output = log.read()
    assert not stuck, f"made no progress: {command}\n{output}"
    return Finished(process.returncode, output)


def _wait_for(process: subprocess.Popen[bytes]) -> bool:
    """Wait for its end; kill it with all that it has started, and return True, if none of them does anything."""
    patience = Patience([process.pid])
    while process.poll() is None:
        if patience.is_over():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.05)
    return False


def launch_together(commands: Sequence[Sequence[str | Path]], folder: Path) -> list[Finished]:
    """`launch` several commands at the same time; their results in the same order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda command: launch(command, folder), commands))


def run_alone(main: str, arguments: Sequence[str | Path], folder: Path, **environment: str) -> Finished:
    """Do what `python -m MODULE ARGUMENTS` does in `folder`: one process, without a launcher.

    main: the module, or "module:function" of one that takes the arguments in place of its `main`.
    """
    (done,) = run_together([(main, arguments)], folder, **environment)
    return done


def run_together(
    commands: Sequence[tuple[str, Sequence[str | Path]]], folder: Path, **environment: str
) -> list[Finished]:
    """`run_alone` several modules with their arguments at the same time; their results in the same order."""
    with tempfile.TemporaryDirectory() as logs:
        files = [Path(logs, f"{number}.log") for number in range(len(commands))]
        processes = [
            start("tests.e2e:do", _call(*command), log, folder=folder, environment=environment)
            for command, log in zip(commands, files, strict=True)
        ]
        return [_finished(code, log) for code, log in zip(wait(processes), files, strict=True)]


def run_ranks(processes: int, main: str, arguments: Sequence[str | Path], folder: Path, **environment: str) -> Finished:
    """`run_alone` a module as a launcher on one node does: in several processes, and all end once one has failed."""
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs, "all.log")
        call = _call(main, arguments)
        ranks = start_ranks("tests.e2e:do", call, [log] * processes, folder=folder, environment=environment)
        return _finished(_wait_as_a_launcher(ranks), log)


def _wait_as_a_launcher(ranks: Sequence[BaseProcess]) -> int | str:
    """Wait until all have ended, and end the others once one has failed. Return its code, or 0."""
    patience = Patience([rank.pid for rank in ranks if rank.pid])
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if patience.is_over():
            for rank in ranks:
                rank.kill()
            return "made no progress"
        time.sleep(0.05)
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    # Launchers look about once a second: by then the others have found what they find too.
    patience = Patience([rank.pid for rank in ranks if rank.pid], seconds=1)
    while any(rank.is_alive() for rank in ranks) and not patience.is_over():
        time.sleep(0.05)
    for rank in ranks:
        rank.terminate()
    wait(ranks)
    return code


def _call(main: str, arguments: Sequence[str | Path]) -> tuple[str, list[str]]:
    return main, [str(part) for part in arguments]


def _finished(code: int | str, log: Path) -> Finished:
    output = log.read_text()
    assert isinstance(code, int), f"{code}\n{output}"
    return Finished(code, output)


def do(main: str, arguments: Sequence[str]) -> int | None:
    """Be the process of a module that is started with arguments; the code that it ends with."""
    # What the environment says of the hub was read when the server imported it.
    importlib.reload(importlib.import_module("huggingface_hub.constants"))
    module, _, function = main.partition(":")
    sys.argv = [module, *arguments]
    code: int | None = getattr(importlib.import_module(module), function or "main")(arguments)
    return code


def deepspeed(processes: int, module: str, *arguments: str | Path) -> list[str | Path]:
    """`deepspeed --num_gpus N --module MODULE ...`, on a port of its own."""
    return [
        "deepspeed", "--num_gpus", str(processes), "--master_port", str(free_port()), "--module", module, *arguments
    ]  # fmt: skip


def make_folder(folder: Path) -> Path:
    """A model in `model`, rows in `data`, and `recipe.yaml` over both; paths in it are relative to the folder."""
    make_tiny_llama(folder / "model")
    make_tasks(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return folder


def make_tiny_llama(folder: Path) -> None:
    """A random Llama of 2 blocks with the tokenizer of a real model."""
    load_tokenizer(resolve_model(str(smollm2_file()))).save_pretrained(folder)
    sizes = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64}
    save_tiny_llama(folder, **sizes, scale=10, noise=0, tie_word_embeddings=True)


def make_tasks(folder: Path) -> None:
    """Two multiple-choice tasks and a completion task; the sizes divide by no number of processes."""
    colours, animals = ["red", "green", "blue", "yellow"], ["cat", "horse", "bee"]
    things = ["wall", "door", "boat", "leaf", "stone", "lamp", "shirt", "kite", "cup", "roof", "gate", "coat"]
    painted = [
        {"prompt": f"The {a} beside the {b} is {c}. What colour?", "choices": colours, "label": i}
        for a in things
        for b in things
        for i, c in enumerate(colours)
        if a < b
    ]
    heard = [
        {"prompt": f"{times} times a {a} came to the {b}. Which animal?", "choices": animals, "label": i}
        for times in ("Two", "Three", "Nine")
        for b in things
        for i, a in enumerate(animals)
    ]
    spelled = [{"prompt": f"Spell {a} {b}.", "response": f"{'-'.join(a)} {b}"} for a in things for b in things]
    for name, rows, test in (("colour", painted, 37), ("animal", heard, 23), ("spell", spelled, 11)):
        rows = [rows[(7 * i) % len(rows)] for i in range(len(rows))] if len(rows) % 7 else rows
        write_rows(folder / name / "test.jsonl", rows[:test])
        write_rows(folder / name / "validation.jsonl", rows[test : test + 9])
        write_rows(folder / name / "train.jsonl", rows[test + 9 :])


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_with_a_broken_rank(what: str, arguments: Sequence[str]) -> int:
    """malora_dist.train where rank 1 alone cannot build its data: it `fails`, or it `hangs`."""
    import malora_dist.train
    from malora_dist.training import inputs

    def broken(*_: Any) -> None:
        if what == "hangs":
            time.sleep(3600)
        raise DataError("rows.jsonl:7: only this rank cannot read it")

    if os.environ["RANK"] == "1":
        inputs.build_data = broken  # type: ignore[assignment]
    return malora_dist.train.main(arguments)


def files(folder: Path) -> set[str]:
    """Every file under a folder, by its path in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes."""
    return {name: (folder / name).read_bytes() for name in files(folder)}


RECIPE: dict[str, Any] = {
    "model": {"name_or_path": "model", "dtype": "float32", "load_in_4bit": True},
    "adapter": {"num_experts": 4, "r": 4, "shared_r": 8, "lora_dropout": 0.1},
    "data": {
        "max_seq_length": 64,
        "mixture": "temperature",
        "near_duplicate_threshold": None,
        "cache_dir": "cache",
        "tasks": [
            {"name": name, **{split: f"data/{name}/{split}.jsonl" for split in ("train", "validation", "test")}}
            for name in ("colour", "animal", "spell")
        ],
    },
    "parallel": {"zero_stage": 3, "timeout_seconds": 60},
    "train": {
        "max_steps": 6,
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 5.0e-3,
        "gradient_checkpointing": True,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 3,
    },
    "evaluation": {"batch_tokens": 256},
    "output_dir": "runs/tiny",
}


if __name__ == "__main__":
    local_rank, what, *rest = sys.argv[1:]
    sys.exit(train_with_a_broken_rank(what, rest))
