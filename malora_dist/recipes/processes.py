"""`python -m malora_dist.recipes.processes [--spread]`: with how many processes the demo runs on this machine.

Prints settings for a shell, NAME=VALUE, and says on stderr how it came to them. With --spread at least two processes
are needed, over which experts are spread.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from malora_dist.config import load_config
from malora_dist.config.compatibility import suggest_world_sizes
from malora_dist.console.terminal import forgive_output
from malora_dist.launch.command import count_gpus

# Without a GPU: as many cores as any machine has.
CPU_PROCESSES = 2


def demo_processes(gpus: int, legal: Sequence[int], *, spread: bool) -> tuple[dict[str, str], str]:
    """Return settings and a sentence about them; `legal` are the numbers of processes that can share the batch."""
    on_cpu = {"NUM_PROCESSES": str(CPU_PROCESSES)}
    if gpus == 0:
        return on_cpu, f"no GPU to use here: {CPU_PROCESSES} processes on the CPU"
    if spread and gpus == 1:
        why = f"experts are spread over {CPU_PROCESSES} processes, and there is one GPU here"
        return on_cpu | {"DS_ACCELERATOR": "cpu"}, f"{why}: all run on the CPU"
    chosen = max(number for number in legal if number <= gpus)
    fewer = f" (the batch can be shared by {', '.join(map(str, legal))})" if chosen < gpus else ""
    return {"NUM_PROCESSES": str(chosen)}, f"GPUs to use here: {gpus}; processes: {chosen}{fewer}"


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the command line. Returns the exit status."""
    forgive_output()
    given = sys.argv[1:] if arguments is None else arguments
    if list(given) not in ([], ["--spread"]):
        print("usage: python -m malora_dist.recipes.processes [--spread]", file=sys.stderr)
        return 2
    legal = suggest_world_sizes(load_config(Path(__file__).with_name("demo.yaml")))
    settings, sentence = demo_processes(count_gpus(environment), legal, spread=bool(given))
    print(sentence, file=sys.stderr)
    print(*(f"{name}={value}" for name, value in settings.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
