"""What the end-to-end tests share: a tiny Llama, three small tasks, a recipe, and launchers run as a user runs them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from malora_dist.errors import DataError
from malora_dist.model import load_tokenizer
from malora_dist.source import resolve_model
from tests.models import save_tiny_llama, smollm2_file

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """A command that has ended. `output` is what it wrote, both streams in order."""

    code: int
    output: str
    seconds: float


def launch(command: Sequence[str | Path], folder: Path, *, timeout: float = 240, **environment: str) -> Finished:
    """Run a command in `folder` as a user would, one thread a process; end it and its children after `timeout`."""
    known = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    path = os.pathsep.join([str(SCRIPTS), known.get("PATH", os.defpath)])
    known |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment}
    started = time.monotonic()
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=known,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"still running after {timeout} s: {command}\n{output}") from None
    return Finished(process.returncode, output, time.monotonic() - started)


def launch_together(commands: Sequence[Sequence[str | Path]], folder: Path, *, timeout: float = 240) -> list[Finished]:
    """`launch` several commands at the same time; their results in the same order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda command: launch(command, folder, timeout=timeout), commands))


def deepspeed(processes: int, module: str, *arguments: str | Path) -> list[str | Path]:
    """`deepspeed --num_gpus N --module MODULE ...`, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["deepspeed", "--num_gpus", str(processes), "--master_port", str(port), "--module", module, *arguments]


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

    def broken(*_: Any) -> None:
        if what == "hangs":
            time.sleep(3600)
        raise DataError("rows.jsonl:7: only this rank cannot read it")

    if os.environ["RANK"] == "1":
        malora_dist.train.build_data = broken  # type: ignore[assignment]
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
