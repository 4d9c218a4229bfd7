"""Where a report goes: the terminal, and files that are never overwritten. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from malora_dist.bench.local.records import Report
from malora_dist.errors import ConfigError
from malora_dist.files.atomic import write_json, write_text

TABLE_WIDTH = 180


def log(text: str) -> None:
    """Print a line on stderr, so that the user sees progress."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Output:
    """Files to write a report to, besides the terminal."""

    json: Path | None = None
    markdown: Path | None = None

    def check(self) -> None:
        """Raise ConfigError, before anything is measured, for a file that exists or whose folder does not."""
        for option, path in (("--json", self.json), ("--markdown", self.markdown)):
            if path is not None and (path.exists() or not path.parent.is_dir()):
                wrong = "exists, and is not overwritten" if path.exists() else "is in a folder that does not exist"
                raise ConfigError(f"{option} {path} {wrong}")

    def put(self, report: Report) -> None:
        """Print the tables and write the files."""
        console = Console()
        # A pipe or a narrow window would lose columns.
        wide = Console(width=max(console.width, TABLE_WIDTH))
        machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
        console.print(machine, markup=False, highlight=False, soft_wrap=True)
        for sheet in report.sheets():
            wide.print(sheet.for_terminal())
        console.print("\n".join(report.notes), markup=False, highlight=False, soft_wrap=True)
        if self.json is not None:
            write_json(self.json, report.as_dict())
        if self.markdown is not None:
            write_text(self.markdown, report.markdown())
