"""What a stage of the checks says: lines that check.sh shows, and a verdict."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path


class Verdicts:
    """The lines of one stage, which fails if one of them is bad."""

    def __init__(self) -> None:
        self.bad: list[str] = []

    def log(self, text: str) -> None:
        """Show a line."""
        print(f"| {text}", flush=True)

    def check(self, name: str, good: bool, detail: str = "") -> None:
        """Show a line with a verdict."""
        if not good:
            self.bad.append(name)
        self.log(f"{'ok  ' if good else 'BAD '} {name} {detail}")

    def attempt(self, name: str, work: Callable[[], str]) -> None:
        """Show what `work` says of its success; an exception is a bad line, and the stage goes on."""
        try:
            self.check(name, True, work())
        except Exception as error:
            traceback.print_exc()
            words = str(error).strip().splitlines()
            self.check(name, False, f"{type(error).__name__}: {words[0][:140] if words else ''}")

    def exit_code(self) -> int:
        return 1 if self.bad else 0


def log_folder() -> Path:
    """Return the folder of the logs."""
    return Path(os.environ.get("LOGS", "."))
