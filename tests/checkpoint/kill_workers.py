"""Processes that save checkpoints until they are killed, forked from one that has imported torch already."""

import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from malora_dist.checkpoint.store import CheckpointStore
from tests.checkpoint.samples import save, tensors_of

SAVE_TOTAL_LIMIT = 2
LAYERS, WIDTH, SHARDS = 8, 2400, 3


def save_forever(folder: Path) -> None:
    """One checkpoint after the other, every third of them the best so far."""
    store = CheckpointStore(folder, SAVE_TOTAL_LIMIT)
    steps = store.steps()
    for step in count(steps[-1] + 1 if steps else 1):
        save(store, step, tensors_of(step, LAYERS, WIDTH), SHARDS)
        if step % 3 == 0:
            store.mark_best(step)


def fork_and_kill(folder: Path, seconds: float) -> int:
    """Let a child save for so long, then kill it; its exit status, which is -9 unless it failed before."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            save_forever(folder)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Read lines of a folder and seconds, and answer each with the status of a killed child."""
    for line in sys.stdin:
        folder, seconds = line.rsplit(maxsplit=1)
        print(fork_and_kill(Path(folder), float(seconds)), flush=True)


if __name__ == "__main__":
    main()
