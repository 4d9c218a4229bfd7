"""Folders for tiny real runs that need no tokenizer from anywhere, and what the runs leave."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.devices import HIDDEN
from tests.e2e import RECIPE, ROOT, make_tasks
from tests.tiny_models import byte_tokenizer, save_tiny_llama

SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def make_run_folder(folder: Path, sizes: Mapping[str, int], changes: Mapping[str, Mapping[str, Any]]) -> Path:
    """A random Llama, three tasks, and the recipe of the end-to-end tests with `changes` in its sections."""
    byte_tokenizer().save_pretrained(folder / "model")
    spread = sizes["hidden_size"] ** -0.5
    save_tiny_llama(folder / "model", **sizes, scale=1, noise=0, initializer_range=spread, tie_word_embeddings=True)
    make_tasks(folder / "data")
    recipe = {name: {**section, **changes.get(name, {})} for name, section in RECIPE.items() if name != "output_dir"}
    recipe["data"] |= {"max_seq_length": 192}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def train_command(output_dir: str, *settings: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """A run of the recipe in this folder, in one process or through a launcher that runs modules."""
    start = list(launcher) if launcher else [sys.executable, "-m"]
    return [*start, "malora_dist.train", "recipe.yaml", "--output_dir", output_dir, *settings]


def environment(*, gpu: bool) -> dict[str, str]:
    """For a run in another folder; without `gpu` on the CPU."""
    known = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    found = [str(Path(path).absolute()) for path in known.get("PYTHONPATH", "").split(os.pathsep) if path]
    known |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *found])}
    return known if gpu else known | HIDDEN


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a run has measured so far, of one kind."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
