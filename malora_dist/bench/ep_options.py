"""The arguments and options of `malora bench ep`. Needs no torch."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from malora_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EpOptions:
    """The arguments and options of `malora bench ep`."""

    recipe: str
    overrides: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    steps: int = 10
    warmup: int = 2
    json: Path | None = None
    markdown: Path | None = None

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
            "--json": self.json,
            "--markdown": self.markdown,
        }
        options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
        return [self.recipe, *options, *self.overrides]

    def check_files(self) -> None:
        """Raise ConfigError if a file to write is there already, or has no folder."""
        for option, path in (("--json", self.json), ("--markdown", self.markdown)):
            if path is not None and (path.exists() or not path.parent.is_dir()):
                wrong = "exists, and is not overwritten" if path.exists() else "is in a folder that does not exist"
                raise ConfigError(f"{option} {path} {wrong}")
