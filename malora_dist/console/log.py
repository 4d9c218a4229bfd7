"""The log of a run: one line a log step, in a file and on the terminal."""

import logging
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from malora_dist.console.durations import as_clock
from malora_dist.console.terminal import is_terminal

if TYPE_CHECKING:
    import torch

LOGGER = "malora_dist"


def start_logging(log_file: Path | None, *, level: int | None = None) -> None:
    """Send this package's messages to stdout, errors to stderr, all to `log_file`.

    Args:
        log_file: is appended to; None for none.
        level: of what is logged. Default: INFO with a file, and ERROR without, as on ranks other than 0.
    """
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(level or (logging.INFO if log_file is not None else logging.ERROR))
    logger.addHandler(_stdout_handler())
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.ERROR)
    logger.addHandler(errors)
    if log_file is not None:
        to_file = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(to_file)
    for noisy in ("DeepSpeed", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # DeepSpeed still calls torch's collectives by their older names, and torch says so on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _stdout_handler() -> logging.Handler:
    handler: logging.Handler
    if is_terminal(sys.stdout):
        handler = RichHandler(console=console(), show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    return handler


def console() -> Console:
    """Return the terminal; a file gets lines wide enough for a table of results."""
    return Console() if is_terminal(sys.stdout) else Console(width=120)


def peak_memory_gib(device: "torch.device") -> float:
    """Return the most memory this process has held, in GiB: of the GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which starts at the size of the process that started this one.
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_left(started: float, done: int, total: int) -> str:
    """Return the estimated time to the end as h:mm:ss."""
    seconds = int((time.monotonic() - started) / max(1, done) * (total - done))
    return as_clock(seconds)
