"""A process that saves checkpoints until it is killed."""

from itertools import count
from pathlib import Path

import torch

from malora_dist.checkpoint.store import CheckpointStore
from tests.checkpoint.samples import save, tensors_of

SAVE_TOTAL_LIMIT = 2
LAYERS, WIDTH, SHARDS = 8, 2400, 3


def save_forever(folder: str, saves: str) -> None:
    """Save one checkpoint after the other, every third of them the best so far; `saves` gets a line before each."""
    torch.set_num_threads(1)
    store = CheckpointStore(Path(folder), SAVE_TOTAL_LIMIT)
    steps = store.steps()
    for step in count(steps[-1] + 1 if steps else 1):
        with open(saves, "a") as file:
            file.write(f"{step}\n")
        save(store, step, tensors_of(step, LAYERS, WIDTH), SHARDS)
        if step % 3 == 0:
            store.mark_best(step)
