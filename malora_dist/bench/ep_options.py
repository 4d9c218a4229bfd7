"""The arguments and options of `malora bench ep`. Needs no torch."""

import shlex
from dataclasses import dataclass

from malora_dist.bench.local.output import Output


@dataclass(frozen=True, kw_only=True)
class EpOptions:
    """The arguments and options of `malora bench ep`."""

    recipe: str
    overrides: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    steps: int = 10
    warmup: int = 2
    output: Output = Output()

    def command(self, world_size: int) -> str:
        """Return the command line that measures the same again, without the files it writes."""
        topics = ["--variants", ",".join(self.topics)] if self.topics else []
        numbers = ["--num_gpus", world_size, "--steps", self.steps, "--warmup", self.warmup]
        return shlex.join(map(str, ["malora", "bench", "ep", self.recipe, *numbers, *topics, *self.overrides]))

    def words(self) -> list[str]:
        """Return the arguments of a process that measures."""
        given = {
            "--steps": self.steps,
            "--warmup": self.warmup,
            "--variants": ",".join(self.topics) or None,
            "--json": self.output.json,
            "--markdown": self.output.markdown,
        }
        options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
        return [self.recipe, *options, *self.overrides]
