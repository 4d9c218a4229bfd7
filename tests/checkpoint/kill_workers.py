"""A process that saves checkpoints until it is killed."""

from itertools import count
from pathlib import Path

import torch

from malora_dist.checkpoint.store import CheckpointStore
from tests.checkpoint.samples import save, tensors_of

SAVE_TOTAL_LIMIT = 2
LAYERS, WIDTH, SHARDS = 8, 2400, 3


def save_forever(folder: str, begun: str) -> None:
    """Save one checkpoint after the other, every third of them the best so far; `begun` is a file to leave before."""
    torch.set_num_threads(1)
    store = CheckpointStore(Path(folder), SAVE_TOTAL_LIMIT)
    steps = store.steps()
    Path(begun).touch()
    for step in count(steps[-1] + 1 if steps else 1):
        save(store, step, tensors_of(step, LAYERS, WIDTH), SHARDS)
        if step % 3 == 0:
            store.mark_best(step)
