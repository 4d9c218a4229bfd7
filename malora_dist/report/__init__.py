"""Tables and pictures of a run, from the files in its folder. Needs no torch; matplotlib is imported when drawing."""

import os
from pathlib import Path

from malora_dist.errors import MaloraError
from malora_dist.files import run_files
from malora_dist.files.atomic import write_text
from malora_dist.report.inputs import read_run
from malora_dist.report.page import build_page
from malora_dist.report.terminal import print_results

__all__ = ["print_results", "write_report"]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `run_dir/report/index.html`, one file that needs no other, and return its path.

    What the run did not write is left out, with a sentence saying so. Raises MaloraError if `run_dir` is no folder, if
    a file in it is damaged, or if the report cannot be written.
    """
    run_dir = Path(run_dir)
    page = build_page(read_run(run_dir))
    path = run_dir / run_files.REPORT / "index.html"
    try:
        path.parent.mkdir(exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise MaloraError(f"{path} cannot be written: {error.strerror}") from error
    return path
