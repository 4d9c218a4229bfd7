"""The folder of a run: claimed once, never overwritten, every file whole or absent."""

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

from malora_dist.errors import ConfigError


def claim_run_folder(output_dir: str | Path) -> Path:
    """Create `output_dir`, or `output_dir-2`, `-3`, ... if it is taken. Raises ConfigError if it cannot be written."""
    wanted = Path(output_dir)
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be created: {error.strerror}") from error
    raise AssertionError("count() ended")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
